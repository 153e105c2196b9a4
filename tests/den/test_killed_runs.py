"""Runs that are killed at any moment end as runs that are not."""

import os
import subprocess
import sys

import pytest
import torch

from den.train.checkpoint import load_checkpoint
from den.train.folder import read_metrics
from tests import killed_run

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:the gates of some tasks differ little"),
]


@pytest.mark.parametrize("kind", ["den", "dag"])
def test_a_run_killed_at_random_moments_is_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("den.recipes.setup.load_set", None)  # replaced by `run`, and put back afterwards
    monkeypatch.setattr("den.recipes.dag.recipe.load_tasks", None)
    torch.set_num_threads(1)
    killed_run.run(kind, tmp_path / "whole")
    command = [sys.executable, killed_run.__file__, kind, str(tmp_path / "killed")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) >= 2
    whole, killed = ({p.name for p in (tmp_path / name).iterdir()} for name in ("whole", "killed"))
    assert whole == killed
    assert read_metrics(tmp_path / "killed") == read_metrics(tmp_path / "whole")
    for name in whole & {"last.safetensors", "best.safetensors", "searched.safetensors"}:
        (expected, record), (tensors, again) = (load_checkpoint(tmp_path / k / name) for k in ("whole", "killed"))
        assert record == again
        assert expected.keys() == tensors.keys()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())
