"""The demonstration, with a small network on few images."""

import dataclasses
import json

import pytest

from den import cli, demo
from den.nn.levels import level_fractions
from den.train.config import DemoConfig, EstimatorTraining, NetworkConfig, PhaseConfig, SelectorTraining
from den.train.folder import read_metrics
from den.train.phases import run_phases
from tests.small_runs import cut_sets, few_images


@pytest.fixture
def small_demo(monkeypatch):
    """The demonstration with a network of three blocks, eight updates, 60 images of each set."""
    cut_sets(monkeypatch)
    monkeypatch.setattr("den.demo.load_set", lambda name, split: few_images(name, split, 60))
    schedule = demo.schedule

    def small(config):
        changes = {
            "stages": 1,
            "epoch_steps": 2,
            "network": NetworkConfig(backbone="wrn8_1", trunk_size=8),
            "estimator": EstimatorTraining(first=PhaseConfig(4, rate=0.05)),
            "selector": SelectorTraining(phase=PhaseConfig(4, rate=1e-3)),
            "progress": False,
        }
        return {
            title: dataclasses.replace(run, data=dataclasses.replace(run.data, batch_size=16), **changes)
            for title, run in schedule(config).items()
        }

    monkeypatch.setattr("den.demo.schedule", small)


def test_both_runs_differ_only_in_what_is_compared():
    dense, elastic = demo.schedule(DemoConfig()).values()
    assert (dense.mode, elastic.mode) == ("dense", "den")
    alike = dataclasses.replace(dense.estimator, first=elastic.estimator.first)
    assert dataclasses.replace(dense, mode="den", out=elastic.out, estimator=alike) == elastic
    assert len(elastic.data.tasks) == 2


def test_both_estimators_get_the_same_flops_in_training():
    dense, elastic = demo.schedule(DemoConfig()).values()
    uniform = sum(level_fractions(elastic.network.levels)) / elastic.network.levels
    random = elastic.estimator.tau + (1 - elastic.estimator.tau) * uniform
    spent = elastic.estimator.first.steps * random + elastic.estimator.finish.steps * elastic.selector.budget
    assert spent == pytest.approx(dense.estimator.first.steps, rel=0.02)
    assert f"{dense.estimator.first.steps:,} updates" in demo.training_note(DemoConfig())


def test_quick_schedule_is_much_shorter_and_lies_apart():
    full, quick = demo.schedule(DemoConfig()), demo.schedule(DemoConfig(quick=True))
    for title in full:
        steps = [sum(phase.settings.steps for phase in run_phases(runs[title])) for runs in (full, quick)]
        assert steps[1] < steps[0] / 3
        assert quick[title].out != full[title].out


@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
def test_demo_prints_a_table_and_writes_figures(tmp_path, capsys, small_demo, quick):
    options = ["--quick"] if quick else []
    assert cli.main(["demo", "--out", str(tmp_path), *options]) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "quick" if quick else tmp_path
    for words in ("accuracy, Deep Elastic Network", "structures in use", "best single structure", "realised fraction"):
        assert words in printed
    assert ("its numbers are not the promise" in printed) == quick
    assert ("What this is to show" in printed) != quick
    assert printed.rstrip().splitlines()[-1].strip() in {path.name for path in folder.glob("*.png")}
    assert len(list(folder.glob("*.png"))) == 5
    assert set(json.loads((folder / "results.json").read_text())["tasks"]) == {"digits", "fashion"}
    assert (folder / "table.txt").read_text() in printed


def test_finished_runs_are_not_trained_again(tmp_path, small_demo):
    demo.train_both(DemoConfig(out=tmp_path))
    stored = [(tmp_path / mode / "metrics.jsonl").read_text() for mode in ("dense", "den")]
    weights = (tmp_path / "den" / "last.safetensors").read_bytes()
    demo.train_both(DemoConfig(out=tmp_path))
    assert [(tmp_path / mode / "metrics.jsonl").read_text() for mode in ("dense", "den")] == stored
    assert (tmp_path / "den" / "last.safetensors").read_bytes() == weights


def test_an_interrupted_demo_continues_where_it_was(tmp_path, small_demo, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    demo.train_both(DemoConfig(out=whole))
    from den.train.engine import Engine

    update, count = Engine.update, 0

    def interrupted(self, objective):
        nonlocal count
        count += 1
        if count == 7:  # in the elastic run's first phase, after the dense run's four updates
            raise KeyboardInterrupt
        update(self, objective)

    monkeypatch.setattr(Engine, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.train_both(DemoConfig(out=broken))
    monkeypatch.setattr(Engine, "update", update)
    demo.train_both(DemoConfig(out=broken))
    for mode in ("dense", "den"):
        assert read_metrics(broken / mode) == read_metrics(whole / mode)


def test_another_seed_in_the_same_folder_is_refused(tmp_path, small_demo, capsys):
    demo.train_both(DemoConfig(out=tmp_path))
    assert cli.main(["demo", "--out", str(tmp_path), "--seed", "1"]) == 2
    assert "seed must stay 0" in capsys.readouterr().err
