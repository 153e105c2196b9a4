"""Modules by the names that they had before they lay in folders."""

import subprocess
import sys
from importlib import import_module

import pytest

from den._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_the_old_name_is_the_same_module(old, recwarn):
    sys.modules.pop(old, None)
    module = import_module(old)
    assert module is import_module(MOVED[old])
    assert module.__name__ == module.__spec__.name == MOVED[old]
    assert [str(w.message).startswith(f"{old} is {MOVED[old]} now") for w in recwarn] == [True]


def test_what_lies_within_is_not_loaded_twice():
    with pytest.warns(DeprecationWarning, match="den.nn.blocks"):
        from den.blocks.bottleneck import BottleneckBlock
    from den.nn.blocks import BottleneckBlock as same

    assert BottleneckBlock is same


def test_a_module_that_never_was_is_missing():
    with pytest.raises(ModuleNotFoundError, match=r"den\.nothing"):
        import_module("den.nothing")


def test_importing_den_imports_no_torch():
    code = "import sys, den; raise SystemExit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
