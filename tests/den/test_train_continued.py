"""Interrupted runs: exact continuation, and folders that cannot be used."""

import dataclasses
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from den.nn.estimator import Estimator
from den.recipes.den import train
from den.train.checkpoint import load_checkpoint
from den.train.folder import read_metrics
from tests.small_runs import alternating_config, cut_sets, train_interrupted


@pytest.fixture
def small_sets(monkeypatch):
    cut_sets(monkeypatch)


def steered(out, baseline):
    selector = dataclasses.replace(alternating_config(out).selector, baseline=baseline, budget=0.5)
    return alternating_config(out, selector=selector)


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """whole_runs(baseline): settings and network of an uninterrupted run, trained once; needs `small_sets`."""

    @cache
    def trained(baseline):
        config = steered(tmp_path_factory.mktemp("whole") / "run", baseline)
        return config, train(config)

    return trained


@pytest.mark.parametrize(
    ("at", "baseline"),
    [(0, "none"), (2, "none"), (6, "leave-one-out"), (8, "running-mean"), (12, "leave-one-out"), (18, "running-mean")],
)
def test_continued_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path, small_sets, monkeypatch, whole_runs, at, baseline
):
    """Interrupted before update `at`: before any epoch, within one, at the border of one, in each kind of phase."""
    (whole, expected), broken = whole_runs(baseline), steered(tmp_path / "broken", baseline)
    train_interrupted(broken, monkeypatch, at)
    found = train(broken, resume=True)
    assert read_metrics(broken.out) == read_metrics(whole.out)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    for checkpoint in ("last", "best"):
        tensors, record = load_checkpoint(whole.out / f"{checkpoint}.safetensors")
        again, record_again = load_checkpoint(broken.out / f"{checkpoint}.safetensors")
        assert record["position"] == record_again["position"]
        assert all(torch.equal(again[name], t) for name, t in tensors.items())


def test_continued_run_of_a_network_with_dropout_drops_the_same(tmp_path, small_sets, monkeypatch):
    """What draws from torch's own generator goes on where it was."""
    plain = Estimator.run

    def run(self, *arguments):
        logits = plain(self, *arguments)
        return tree_map(lambda each: F.dropout(each, 0.5, self.training), logits)

    monkeypatch.setattr(Estimator, "run", run)
    expected = train(alternating_config(tmp_path / "whole"))
    train_interrupted(alternating_config(tmp_path / "broken"), monkeypatch, 11)
    found = train(alternating_config(tmp_path / "broken"), resume=True)
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())


def test_continuing_a_finished_run_changes_nothing(tmp_path, small_sets):
    config = alternating_config(tmp_path / "run")
    train(config)
    before = read_metrics(config.out), load_checkpoint(config.out / "last.safetensors")[1]["position"]
    train(config, resume=True)
    assert before == (read_metrics(config.out), load_checkpoint(config.out / "last.safetensors")[1]["position"])


def test_failed_save_during_training_leaves_a_run_that_continues(tmp_path, small_sets, monkeypatch):
    config, calls = alternating_config(tmp_path / "run"), []

    def fails_later(*arguments):
        calls.append(arguments)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("den.support.files.os.fsync", fails_later)
        with pytest.raises(ValueError, match=r"No space left"):
            train(config)
    train(config, resume=True)
    train(whole := alternating_config(tmp_path / "whole"))
    assert read_metrics(config.out) == read_metrics(whole.out)


def test_second_run_in_a_folder_is_refused(tmp_path, small_sets):
    train(alternating_config(tmp_path / "run", mode="dense"))
    with pytest.raises(ValueError, match=r"folder without a run, got .*--resume"):
        train(alternating_config(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"mode must stay dense to continue .*, got den"):
        train(alternating_config(tmp_path / "run"), resume=True)


@pytest.mark.parametrize("place", ["a file", "under a file"])
def test_run_folder_that_cannot_be_written_is_refused(tmp_path, small_sets, place):
    (tmp_path / "taken").write_text("")
    out = tmp_path / "taken" if place == "a file" else tmp_path / "taken" / "run"
    with pytest.raises(ValueError, match="out must be a folder that can be written"):
        train(alternating_config(out))


def test_truncated_checkpoint_cannot_be_continued(tmp_path, small_sets):
    config = alternating_config(tmp_path / "run", mode="dense")
    train(config)
    last = config.out / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"last\.safetensors must be a complete checkpoint"):
        train(config, resume=True)


def test_nothing_to_continue_is_said(tmp_path, small_sets):
    with pytest.raises(ValueError, match=r"must hold last\.safetensors to be continued"):
        train(alternating_config(tmp_path / "run"), resume=True)
