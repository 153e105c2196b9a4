"""Runs opened for inference."""

import dataclasses

import pytest
import torch

from den.data import load_set
from den.recipes import RECIPES
from den.recipes.base import Method
from den.runs import trained as runs
from den.runs.trained import open_run


@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_a_den_run_gives_its_selectors_structures(tmp_path, stored_run, checkpoint):
    config = stored_run(tmp_path / "run")
    run = open_run(tmp_path / "run", checkpoint)
    assert (run.config, run.checkpoint.stem, run.model.training) == (config, checkpoint, False)
    images = load_set("digits", "test").inputs(slice(0, 40))
    levels = run.structures(images, "digits")
    assert torch.equal(levels, run.model.select(images, "digits"))
    assert len(levels.unique(dim=0)) > 1


def test_a_dense_run_gives_the_full_structure(tmp_path, stored_run):
    stored_run(tmp_path / "run", "dense")
    run = open_run(tmp_path / "run")
    images = load_set("digits", "test").inputs(slice(0, 4))
    assert run.structures(images, "digits") is None
    assert run.model.estimator(images, "digits", run.structures(images, "digits")).shape == (4, 10)


def test_a_method_that_adds_itself_is_opened(tmp_path, stored_run, monkeypatch):
    stored_run(tmp_path / "run")

    class Lowest(Method):
        def structures(self, images, task):
            return torch.zeros(len(images), self.model.num_blocks, dtype=torch.int64)

    monkeypatch.setitem(RECIPES, "den", Lowest)
    images = load_set("digits", "test").inputs(slice(0, 4))
    assert open_run(tmp_path / "run").structures(images, "digits").sum() == 0


def test_unfit_folders_are_explained(tmp_path, stored_run, monkeypatch):
    config = stored_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"config\.json must be a readable JSON file"):
        open_run(tmp_path / "absent")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "stored_config", lambda folder: dataclasses.replace(config, mode="oracle"))
        with pytest.raises(ValueError, match=r"mode of .* must be one of den, dense.*, got 'oracle'"):
            open_run(tmp_path / "run")
    (tmp_path / "run" / "best.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="must be a complete checkpoint"):
        open_run(tmp_path / "run", "best")
