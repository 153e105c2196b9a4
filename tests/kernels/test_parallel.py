"""What threads share (csrc/parallel.h, crew.h) under the thread sanitizer, with an OpenMP runtime that it sees into."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = "-std=c++17 -O1 -g -fsanitize=thread -fopenmp -Wall -Wextra -Werror"


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The program tests/kernels/threads/parallel_main.cpp; skips where the compiler has no thread sanitizer."""
    folder, made = ROOT / "tests/kernels/threads", tmp_path_factory.mktemp("threads")
    (made / "empty.cpp").write_text("int main() { return 0; }")
    probe = ["g++", "-fsanitize=thread", made / "empty.cpp", "-o", made / "empty"]
    if subprocess.run(probe, capture_output=True).returncode or subprocess.run([made / "empty"]).returncode:
        pytest.skip("g++ has no thread sanitizer that runs here")
    sources = [folder / "parallel_main.cpp", folder / "openmp.cpp", ROOT / "csrc/crew.cpp"]
    command = ["g++", *FLAGS.split(), "-I", ROOT / "csrc", *sources, "-o", made / "parallel_main", "-ldl"]
    subprocess.run(command, check=True)
    return made / "parallel_main"


@pytest.mark.parametrize("case", ["failure", "shared", "layers", "callers", "thrown", "slow"])
def test_no_race_and_no_thread_left_waiting(program, case):
    done = subprocess.run([program, case], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[:2000]
