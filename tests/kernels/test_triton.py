"""When the Triton kernels run, and what happens where they do not."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from den import Task, create_model
from den_kernels import _triton


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch):
    monkeypatch.setattr(_triton, "_said", set())


def gpu(monkeypatch, capability: tuple[int, int]) -> torch.device:
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return torch.device("cuda", 0)


def test_not_on_a_cpu():
    assert not _triton.runs_on(torch.device("cpu"))


def test_on_ampere_and_later(monkeypatch):
    monkeypatch.setattr(_triton, "HAS_TRITON", True)
    assert _triton.runs_on(gpu(monkeypatch, (8, 0)))


@pytest.mark.parametrize(
    ("capability", "triton", "reason"),
    [((7, 5), True, r"compute capability 7\.5"), ((9, 0), False, "triton is not installed")],
)
def test_elsewhere_one_warning_says_why(monkeypatch, recwarn, capability, triton, reason):
    monkeypatch.setattr(_triton, "HAS_TRITON", triton)
    device = gpu(monkeypatch, capability)
    with pytest.warns(UserWarning, match=reason):
        assert not _triton.runs_on(device)
    recwarn.clear()
    assert not _triton.runs_on(device)
    assert not recwarn


def test_importing_the_library_does_not_import_triton():
    code = "import sys, den_kernels, den; import den.nn.model; print('triton' in sys.modules)"
    before = "import sys, torch, torch.nn, torch.library; print('triton' in sys.modules)"
    said = [
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout
        for c in (code, before)
    ]
    assert said[0] == said[1]


def test_a_network_runs_without_looking_at_its_data():
    """On the meta device there is no data: what would wait for a GPU to read some fails here."""
    model = create_model("wrn14_1", [Task("small", 10, 8), Task("large", 10, 28)]).to("meta")
    images = [torch.empty(4, 3, 8, 8, device="meta"), torch.empty(6, 3, 28, 28, device="meta")]
    for training in (True, False):
        model.train(training)
        with torch.set_grad_enabled(training):
            logits, levels = model(images, ["small", "large"], return_levels=True)
        assert [part.shape for part in logits] == [(4, 10), (6, 10)]
        assert levels.shape == (10, model.num_blocks)
    model.train()
    structures = torch.empty(10, model.num_blocks, dtype=torch.int64, device="meta")
    sum(part.sum() for part in model.estimator(images, ["small", "large"], structures)).backward()
    assert all(block.conv1.weight.grad is not None for block in model.estimator.blocks)
