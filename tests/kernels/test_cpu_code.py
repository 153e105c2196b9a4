"""The machine code of the CPU kernels: what they sum stays in registers."""

import re
import shutil
import subprocess
from collections import Counter

import pytest

from den_kernels._extension import extension

FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_products_with_avx512_read_their_operands_from_registers():
    # GCC keeps integers in vector registers where it lacks others; a tile that then has one too few reads a weight from
    # the stack for every product, which took a third of the rate and was seen in no value.
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", extension.__file__], capture_output=True, text=True, check=True
    ).stdout
    products, spilled, name = Counter(), Counter(), ""
    for line in listing.splitlines():
        if match := FUNCTION.match(line):
            name = match[1]
        elif "vfmadd" in line and "%zmm" in line:
            products[name] += 1
            spilled[name] += "(%rsp" in line or "(%rbp" in line
    if not products:
        pytest.skip("the extension was built without AVX-512")
    assert {name: count for name, count in spilled.items() if 8 * count > products[name]} == {}
