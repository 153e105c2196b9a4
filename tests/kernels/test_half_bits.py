"""float16 by its bits, for compilers whose C++ has no half precision: the same numbers as the compiler's own."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
PROGRAM = """
#include <cstdio>
#include "numbers.h"
using namespace den_kernels;
int main() {
  uint64_t sum = 0;
  const auto mix = [&](uint32_t bits) { sum = (sum ^ bits) * 1099511628211u; };
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    fp16 half;
    const uint16_t own = static_cast<uint16_t>(bits);
    std::memcpy(&half, &own, sizeof own);
    const float value = widen(half);
    mix(value != value ? 1 : bits_of(value));
  }
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 997) {
    const float value = float_of(static_cast<uint32_t>(bits));
    fp16 half;
    narrow(value, half);
    uint16_t own;
    std::memcpy(&own, &half, sizeof own);
    mix(value != value ? (own & 0x7C00) == 0x7C00 && (own & 0x3FF) : own);
  }
#ifdef DEN_KERNELS_FP16_BITS
  std::printf("bits %llx", static_cast<unsigned long long>(sum));
#else
  std::printf("own %llx", static_cast<unsigned long long>(sum));
#endif
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_every_half_and_many_floats_are_converted_as_by_the_compiler(tmp_path):
    (tmp_path / "program.cpp").write_text(PROGRAM)
    printed = []
    for name, *flags in (("own",), ("bits", "-DDEN_KERNELS_FP16_BITS")):
        command = [
            "g++",
            "-O1",
            "-std=c++17",
            *flags,
            f"-I{CSRC}",
            str(tmp_path / "program.cpp"),
            "-o",
            str(tmp_path / name),
        ]
        subprocess.run(command, check=True)
        printed.append(subprocess.run([tmp_path / name], check=True, capture_output=True, text=True).stdout.split())
    (way, own), (_, bits) = printed
    if way == "bits":
        pytest.skip("this g++ has no half precision of its own")
    assert own == bits
