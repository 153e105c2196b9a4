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


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory):
    """The folder of a killed run of each kind, and how many times each was killed."""
    place = tmp_path_factory.mktemp("killed")
    found = subprocess.run(
        [sys.executable, killed_run.__file__, str(place)], capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stderr
    return {
        kind: (place / kind, int(count)) for kind, count in zip(killed_run.KINDS, found.stdout.split(), strict=True)
    }


@pytest.mark.parametrize("kind", killed_run.KINDS)
def test_a_run_killed_at_random_moments_is_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, killed_runs, kind):
    monkeypatch.setattr("den.recipes.setup.load_set", None)  # replaced by `run`, and put back afterwards
    monkeypatch.setattr("den.recipes.dag.recipe.load_tasks", None)
    torch.set_num_threads(1)
    killed_run.run(kind, tmp_path / "whole")
    whole, (killed, times) = tmp_path / "whole", killed_runs[kind]
    assert times >= 2
    files = {path.name for path in whole.iterdir()}
    assert files == {path.name for path in killed.iterdir()}
    assert read_metrics(killed) == read_metrics(whole)
    for name in files & {"last.safetensors", "best.safetensors", "searched.safetensors"}:
        (expected, record), (tensors, again) = (load_checkpoint(folder / name) for folder in (whole, killed))
        assert record == again
        assert expected.keys() == tensors.keys()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())
