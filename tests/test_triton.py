"""When the Triton kernels run, and what happens where they do not."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from den_kernels import _triton


@pytest.fixture(autouse=True)
def _forget():
    _triton.runs_on.cache_clear()
    yield
    _triton.runs_on.cache_clear()


def gpu(monkeypatch, capability: tuple[int, int]) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return torch.device("cuda", 0)


def test_not_on_a_cpu():
    assert not _triton.runs_on(torch.device("cpu"))


def test_on_ampere_and_later(monkeypatch):
    monkeypatch.setattr(_triton, "find_spec", lambda name: SimpleNamespace())
    assert _triton.runs_on(gpu(monkeypatch, (8, 0)))


@pytest.mark.parametrize(
    ("capability", "triton", "reason"),
    [((7, 5), SimpleNamespace(), r"compute capability 7\.5"), ((9, 0), None, "triton is not installed")],
)
def test_elsewhere_one_warning_says_why(monkeypatch, recwarn, capability, triton, reason):
    monkeypatch.setattr(_triton, "find_spec", lambda name: triton)
    device = gpu(monkeypatch, capability)
    with pytest.warns(UserWarning, match=reason):
        assert not _triton.runs_on(device)
    recwarn.clear()
    assert not _triton.runs_on(device)
    assert not recwarn


def test_importing_the_library_does_not_import_triton():
    code = "import sys, den_kernels, den; import den.model; print('triton' in sys.modules)"
    before = "import sys, torch, torch.nn, torch.library; print('triton' in sys.modules)"
    said = [
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout
        for c in (code, before)
    ]
    assert said[0] == said[1]
