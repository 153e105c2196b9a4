"""Dense scenarios from files to report: trained, broken off, resumed, measured against single-task networks."""

import dataclasses
import json
import statistics

import numpy as np
import pytest

from den.cli import main
from den.commands import parse
from den.dag.config import (
    DagDataConfig,
    DagNetworkConfig,
    DagReportConfig,
    DagTrainConfig,
    DagTraining,
    ReductionConfig,
)
from den.dag.evaluate import evaluate_tasks
from den.dag.scenarios import SCENARIOS, load_tasks
from den.recipes.dag.recipe import load_network
from den.recipes.dag.search import train
from den.report.dag.dense import delta_tables
from den.report.dag.measured import measure
from den.report.dag.report import report
from den.train.folder import read_metrics
from tests.dense_files import write_npy_scenes, write_pascal
from tests.drawn import assert_drawn
from tests.small_runs import assert_same_weights, train_interrupted

pytestmark = pytest.mark.filterwarnings("ignore:the gates of some tasks differ little")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("scenes")
    write_npy_scenes(place / "nyuv2", {"train": 9, "val": 3}, classes=13)
    write_npy_scenes(place / "cityscapes", {"train": 6, "val": 3}, classes=7, label="label_7", normals=False)
    write_pascal(place / "pascal", {"train": ["a", "b", "empty", "d"], "val": ["e", "f"]})
    return place


def tiny(root, out, scenario="nyuv2", training=None, data=None, **changes):
    size = {"nyuv2": {"classes": 13}, "cityscapes": {"classes": 7}, "pascal": {"size": 32}}[scenario]
    network = DagNetworkConfig(states=5, flow=2, channels=8, stages=(3, 2) if scenario == "nyuv2" else ())
    return dataclasses.replace(
        DagTrainConfig(
            out=out,
            epoch_steps=2,
            progress=False,
            data=DagDataConfig(scenario, root / scenario, batch_size=2, **size, **(data or {})),
            network=network,
            training=DagTraining(steps=6, shares=(0.2, 0.5, 0.3), **(training or {})),
            reduction=ReductionConfig(norm_batches=2),
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def all_tasks(root, tmp_path_factory):
    """The folder and the network of a run of all tasks."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    return folder, train(tiny(root, folder))


@pytest.mark.parametrize(
    ("scenario", "changes"),
    [
        ("nyuv2", {}),
        ("nyuv2", {"mode": "adashare"}),
        ("cityscapes", {"precision": "bfloat16"}),
        ("pascal", {}),
        ("pascal", {"precision": "bfloat16"}),
    ],
)
def test_a_scenario_trains_on_its_files_and_is_measured(root, tmp_path, scenario, changes):
    config = tiny(root, tmp_path / "run", scenario, data={"validation": 0.3}, **changes)
    model = train(config)
    sets = load_tasks(config.data, "test")
    results = evaluate_tasks(model, sets)
    assert list(results) == [task.name for task in sets[0].tasks] == [task.name for task in model.tasks]
    assert all(result.images == len(sets[0]) for result in results.values())
    assert changes.get("mode") or sum(model.structure(0).edges) == -(-len(model.edges) // 2)
    line = read_metrics(config.out)[-1]
    assert set(line["held_out"]) == set(results)
    assert {f"loss_{name}" for name in results} < set(line["train"])
    again = evaluate_tasks(load_network(config.out / "last.safetensors"), sets)
    assert again == results


@pytest.mark.parametrize("broken_off_at", [1, 4, 6])
def test_a_dense_run_broken_off_continues_to_the_same_weights(root, tmp_path, monkeypatch, all_tasks, broken_off_at):
    _, whole = all_tasks
    config = tiny(root, tmp_path / "broken")
    train_interrupted(config, monkeypatch, broken_off_at, train)
    assert_same_weights(train(config, resume=True), whole)


def test_a_network_learns_the_scenes(root, tmp_path):
    """Depth is 1 in the dark half and 4 in the bright one: the plain mean is off by 1.5."""
    training = DagTraining(steps=60, shares=(0.0, 0.0, 1.0), rate=0.02, fine_rate=0.02)
    config = tiny(root, tmp_path, data={"only": ("depth",)}, mode="hard")
    config = dataclasses.replace(config, training=training, epoch_steps=60)
    results = evaluate_tasks(train(config), load_tasks(config.data, "test"))
    assert results["depth"].metrics["abs_error"] < 0.5


def gain(name, ours, single):
    return (-1 if name in ("abs_error", "rel_error", "mean_angle", "median_angle") else 1) * (ours - single) / single


@pytest.mark.parametrize("references", [("depth", "normals"), ("single",)])
def test_delta_is_against_the_runs_of_single_tasks(root, tmp_path, all_tasks, references):
    for name in references:
        only = () if name == "single" else (name,)
        train(tiny(root, tmp_path / name, data={"only": only}, mode="single" if name == "single" else "hard"))
    runs = [all_tasks[0], *(tmp_path / name for name in references)]
    text = report(DagReportConfig(runs=tuple(runs), markdown=tmp_path / "dense.md"))
    assert_drawn(all_tasks[0] / "graph.png")
    assert "| ms per 4 images |" in text
    assert (tmp_path / "dense.md").read_text().endswith(text)
    every, *alone = (measure(path, time=False) for path in runs)
    deltas = []
    for name, single in ((name, result.metrics) for run in alone for name, result in run.results.items()):
        ours = every.results[name].metrics
        deltas.append(100 * statistics.mean(gain(m, ours[m], v) for m, v in single.items() if v))
        assert f"{name} {deltas[-1]:+.1f}" in text
    assert f"over tasks {statistics.mean(deltas):+.1f}." in text
    assert "segmentation: miou" in text
    assert "Published" not in text  # the published values are of 40 classes, and depth has a run of its own


def test_without_runs_of_single_tasks_the_published_values_stand(all_tasks):
    run = measure(all_tasks[0], time=False)
    text = delta_tables([run])
    assert "Published single-task values (AdaShare protocol) are of another network" in text
    row = next(line for line in text.splitlines() if "depth: abs_error" in line)
    assert "0.6200" in row
    assert next(line for line in text.splitlines() if "segmentation: miou" in line).split("|")[3].strip() == ""
    summary = delta_tables([run, run]).splitlines()
    assert [cell.strip() for cell in summary[0].split("|")[2:6]] == [
        "Delta segmentation, %", "Delta depth, %", "Delta normals, %", "over tasks",
    ]  # fmt: skip
    cells = [cell.strip() for cell in summary[2].split("|")[2:6]]
    assert cells[0] == ""  # 13 classes have no published values
    assert float(cells[3]) == pytest.approx((float(cells[1]) + float(cells[2])) / 2, abs=0.1)
    assert f"depth {cells[1]}, normals {cells[2]}; over tasks {cells[3]}." in text


def test_command_line_trains_resumes_and_reports_a_scenario(root, tmp_path, capsys):
    out = tmp_path / "run"
    words = [
        "dag-nyuv2", "--data.root", str(root / "nyuv2"), "--data.classes", "13", "--data.batch-size", "2",
        "--out", str(out), "--training.steps", "4", "--network.channels", "8", "--network.states", "4",
        "--network.flow", "2", "--network.stages", "2", "2", "--reduction.norm-batches", "1", "--no-progress",
    ]  # fmt: skip
    assert main(["train", *words]) == 0
    assert main(["dag", "train", *words, "--resume"]) == 0
    assert main(["dag", "report", str(out), "--no-time"]) == 0
    assert "normals: within_30" in capsys.readouterr().out
    stored = json.loads((out / "config.json").read_text())
    assert stored["network"]["stages"] == [2, 2]
    assert load_network(out / "last.safetensors").graph.stages == (2, 2)
    assert main(["dag", "train", "dag-pascal", "--out", str(out), "--resume"]) == 2
    assert "scenario must be dag-nyuv2 as stored, got dag-pascal" in capsys.readouterr().err
    assert main(["dag", "train", "dag-mars"]) == 2
    assert "scenario must be one of dag-omniglot, dag-cifar100, dag-nyuv2" in capsys.readouterr().err
    assert main(["dag", "train", "dag-cityscapes", "--out", str(tmp_path / "other")]) == 2
    assert "data root must hold train/{image,label,depth}/*.npy" in capsys.readouterr().err


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_named_scenario_sets_the_defaults(name):
    settings = parse(["dag", "train", name, "--training.steps", "7"]).settings
    wanted = SCENARIOS[name]
    assert settings == dataclasses.replace(wanted, training=dataclasses.replace(wanted.training, steps=7))
    assert f"dag-{settings.data.scenario}" == name


def test_a_task_without_targets_is_refused(tmp_path):
    write_npy_scenes(tmp_path / "nyuv2", {"train": 4, "val": 2}, classes=13)
    config = tiny(tmp_path, tmp_path / "run")
    model, sets = train(config), load_tasks(config.data, "test")
    for path in (tmp_path / "nyuv2" / "val" / "depth").iterdir():
        np.save(path, np.zeros((24, 32, 1)))
    with pytest.raises(ValueError, match="evaluate: depth must have a target in the set, got none in 2 images"):
        evaluate_tasks(model, sets)
    with pytest.raises(ValueError, match="depth of nyuv2 must have a target, got none in 2 images"):
        load_tasks(config.data, "test")
    only = dataclasses.replace(config.data, only=("segmentation", "normals"))
    assert len(load_tasks(only, "test")[0]) == 2


@pytest.mark.parametrize("weights", [(1.0, 2.0), (1.0, 1.0, -1.0)])
def test_weights_that_do_not_fit_are_refused(root, tmp_path, weights):
    with pytest.raises(
        ValueError, match=r"training\.loss_weights must be (one for each of 3 tasks|at least 0), got \["
    ):
        train(tiny(root, tmp_path, training={"loss_weights": weights}))
