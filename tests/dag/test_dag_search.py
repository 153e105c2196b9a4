"""The three stages: gates, halves, reduction, exact continuation, reports and command line, on small real images."""

import dataclasses
import json
import re

import matplotlib.image
import pytest
import torch

from den.cli import main
from den.dag import Graph, TaskGates, reduce
from den.dag.config import (
    DagDataConfig,
    DagNetworkConfig,
    DagReportConfig,
    DagTrainConfig,
    DagTraining,
    ReductionConfig,
)
from den.dag.evaluate import deployed_parameters, evaluate_tasks, task_costs
from den.dag.scenarios import by_coarse_label
from den.data import ImageSet
from den.recipes.dag.phases import search_phases
from den.recipes.dag.recipe import SearchRecipe, load_network
from den.recipes.dag.search import reduce_tasks, reestimate_norms, search_step, train
from den.report.dag.comparison import comparison, verdicts
from den.report.dag.drawing import graph_figure, task_colour
from den.report.dag.measured import measure
from den.report.dag.report import command_of, report
from den.support.settings import from_dict, to_dict
from den.train.checkpoint import load_checkpoint
from den.train.engine import Engine
from den.train.folder import read_metrics
from tests.small_runs import assert_same_weights, digit_tasks, train_interrupted, use_dag_tasks

pytestmark = pytest.mark.filterwarnings("ignore:the gates of some tasks differ little")


@pytest.fixture(autouse=True)
def three_tasks(monkeypatch):
    """Three tasks of different classes out of the digits, 8x8."""
    kinds = {"low": (0, 1, 2), "middle": (3, 4, 5, 6), "high": (7, 8, 9)}
    use_dag_tasks(monkeypatch, lambda data, split, root=None: digit_tasks(split, kinds, 90))


def tiny(out, training=None, **changes):
    settings = {"steps": 10, "shares": (0.2, 0.5, 0.3), **(training or {})}
    return dataclasses.replace(
        DagTrainConfig(
            out=out,
            epoch_steps=3,
            progress=False,
            data=DagDataConfig(batch_size=12),
            network=DagNetworkConfig(states=5, flow=2, channels=8, trunk_size=4),
            training=DagTraining(**settings),
            reduction=ReductionConfig(norm_batches=3),
        ),
        **changes,
    )


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_run_reduces_every_task_and_leaves_its_records(tmp_path):
    config = tiny(tmp_path / "run", data=DagDataConfig(batch_size=12, validation=0.2))
    model = train(config)
    for k in range(3):
        assert sum(model.structure(k).edges) == 4  # of 7, half of them removed
    lines = read_metrics(config.out)
    assert [line["stage"] for line in lines] == ["warm-up", "search", "search", "fine-tuning"]
    assert [line["step"] for line in lines] == [2, 5, 7, 10]
    assert set(lines[-1]["held_out"]) == {"low", "middle", "high"}
    assert {"last.safetensors", "searched.safetensors", "config.json", "versions.json", "events"} <= {
        path.name for path in config.out.iterdir()
    }
    again = load_network(config.out / "last.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_gates_rest_at_one_half_in_warm_up_and_as_they_are_in_fine_tuning(tmp_path):
    model = train(tiny(tmp_path / "warm", {"shares": (1.0, 0.0, 0.0)}))
    assert model.gates.gamma.sigmoid().sum(1).tolist() == [3.5] * 3  # |E| / 2
    model = train(tiny(tmp_path / "run"))
    searched = load_network(tmp_path / "run" / "searched.safetensors")
    for name in ("alpha", "beta", "gamma"):
        before, after = getattr(searched.gates, name), getattr(model.gates, name)
        assert torch.equal(before, after)
        assert before.abs().sum() > 0
    assert not torch.equal(searched.stems[0].conv.conv.weight, model.stems[0].conv.conv.weight)


def test_search_brings_the_gates_to_about_kappa(tmp_path):
    def searched(squeeze):
        training = {"steps": 120, "shares": (0.0, 1.0, 0.0), "gate_rate": 0.02, "squeeze": squeeze}
        config = tiny(tmp_path / str(squeeze), training)
        return train(dataclasses.replace(config, epoch_steps=120)).gates.gamma.sigmoid().sum(1)

    kappa, squeezed, free = 0.35 * 7, searched(1.0), searched(0.0)
    assert (squeezed - kappa).abs().max() < 0.5
    assert (free - kappa).min() > 0.6


@pytest.mark.parametrize(
    ("search", "moved"),
    [
        ("alternating", {"edges", "stems", "gates"}),
        ("joint", {"edges", "stems", "gates"}),
        ("frozen", {"stems", "gates"}),
    ],
)
def test_search_variants_move_what_they_should(tmp_path, search, moved):
    with Engine(tiny(tmp_path, {"search": search}), SearchRecipe) as engine:
        engine.position.phase = 1
        engine.model.train()
        before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
        search_step(engine, engine.batches["all"].next())
        after = dict(engine.model.named_parameters())
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed - {"heads"} == moved


def test_alternating_halves_hold_different_images(tmp_path):
    with Engine(tiny(tmp_path), SearchRecipe) as engine:
        halves = [engine.batches[name].sets for name in ("weights", "gates")]
    for first, second, task in zip(*halves, engine.batches["all"].sets, strict=True):
        assert len(first) + len(second) == len(task)
        assert abs(len(first) - len(second)) <= 1
        assert not {x.numpy().tobytes() for x in first.images} & {x.numpy().tobytes() for x in second.images}


@pytest.mark.parametrize("broken_off_at", [1, 4, 6, 8, 9])
def test_a_run_broken_off_anywhere_continues_to_the_same_weights(tmp_path, monkeypatch, broken_off_at):
    whole = train(tiny(tmp_path / "whole"))
    config = tiny(tmp_path / "broken")
    train_interrupted(config, monkeypatch, broken_off_at, train)
    assert_same_weights(train(config, resume=True), whole)
    first, second = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "broken")
    assert [line["train"] for line in first] == [line["train"] for line in second]


def test_settings_of_earlier_versions_mean_what_they_meant():
    """Then one share was of edges and ends alike, and AdaShare drew once; what a user leaves out has today's
    default."""
    old = {
        "reduction": {"ratio": 0.6, "ranking": "flow", "guard": True, "norm_batches": 30},
        "peers": {"temperature": 5.0, "cooling": 0.965, "sparsity": 0.2, "sharing": 0.2, "stitch_rate": 10.0},
    }
    config = from_dict(DagTrainConfig, old)
    assert config.reduction == ReductionConfig(ratio=0.6, ends=0.6)
    assert (config.peers.draws, config.peers.curriculum) == (1, False)
    assert from_dict(DagTrainConfig, to_dict(DagTrainConfig())) == DagTrainConfig()
    assert from_dict(DagTrainConfig, {"reduction": {"ratio": 0.6}}).reduction.ends is None


def test_a_frozen_search_lets_all_shared_weights_rest(tmp_path):
    network = DagNetworkConfig(states=5, flow=2, channels=8, trunk_size=4, stages=(3, 2))
    with Engine(tiny(tmp_path, {"search": "frozen"}, network=network), SearchRecipe) as engine:
        engine.position.phase = 1
        engine.model.train()
        before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
        search_step(engine, engine.batches["all"].next())
        moved = {name.split(".")[0] for name, p in engine.model.named_parameters() if not torch.equal(before[name], p)}
        assert moved == {"stems", "heads", "gates"}
        assert all(p.requires_grad for p in engine.model.parameters())


def test_another_reduction_starts_from_a_searched_network(tmp_path):
    train(tiny(tmp_path / "flow"))
    other = train(tiny(tmp_path / "random", start=tmp_path / "flow", reduction=ReductionConfig(ranking="random")))
    searched = load_network(tmp_path / "flow" / "searched.safetensors")
    assert torch.equal(other.gates.gamma, searched.gates.gamma)
    assert [line["stage"] for line in read_metrics(tmp_path / "random")] == ["fine-tuning"]
    assert len({other.structure(k) for k in range(3)}) > 1


def test_hard_sharing_keeps_the_whole_graph_for_everybody(tmp_path):
    model = train(tiny(tmp_path, mode="hard"))
    assert all(model.structure(k) == model.graph.whole() for k in range(3))
    assert model.gates.gamma.abs().sum() == 0
    assert [line["stage"] for line in read_metrics(tmp_path)] == ["fine-tuning"] * 4


def test_without_read_in_and_read_out_only_the_ends_are_left(tmp_path):
    network = DagNetworkConfig(states=5, flow=2, channels=8, trunk_size=4, read_in=False, read_out=False)
    model = train(tiny(tmp_path, network=network))
    for k in range(3):
        kept = model.structure(k)
        assert kept.read_in == (True, False, False, False, False)
        assert kept.read_out == (False, False, False, False, True)
        assert sum(kept.edges) == 4


def test_reestimated_norms_are_means_over_the_batches(tmp_path):
    with Engine(tiny(tmp_path), SearchRecipe) as engine:
        stem, batches = engine.model.stems[0], engine.batches["all"]
        state = {
            name: value.clone() if torch.is_tensor(value) else value for name, value in batches.state_dict().items()
        }
        seen = torch.stack([stem.conv.conv(batches.next().images[0]).mean((0, 2, 3)) for _ in range(4)]).mean(0)
        batches.load_state_dict(state)
        reestimate_norms(engine.model, batches, 4)
    torch.testing.assert_close(stem.conv.norm.running_mean, seen, rtol=1e-4, atol=1e-6)
    assert stem.conv.norm.momentum == 0.1


def test_gates_that_hardly_differ_are_warned_of(tmp_path):
    with Engine(tiny(tmp_path), SearchRecipe) as engine, pytest.warns(UserWarning, match="flow follows the position"):
        reduce_tasks(engine)


@pytest.mark.filterwarnings("ignore:.*the reduction kept")
def test_a_ratio_that_leaves_no_path_is_explained(tmp_path):
    config = tiny(tmp_path, reduction=ReductionConfig(ratio=1.0, ends=1.0))
    with Engine(config, SearchRecipe) as engine, pytest.warns(UserWarning, match="low: the reduction kept"):
        reduce_tasks(engine)


def test_a_kappa_that_never_squeezes_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="set it below 0.5"):
        search_phases(tiny(tmp_path, {"kappa": 0.6}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": DagTraining(shares=(0.5, 0.5))}, "shares must be three"),
        ({"training": DagTraining(kappa=1.5)}, r"kappa must be in 0\.\.1"),
        ({"reduction": ReductionConfig(ratio=1.5)}, r"ratio must be in 0\.\.1"),
        ({"reduction": ReductionConfig(ends=-0.5)}, r"ends must be in 0\.\.1"),
        ({"reduction": ReductionConfig(ranking="gates", rerank=True)}, "ranking must be flow to rerank, got gates"),
        ({"data": DagDataConfig(protocol="mtl20", validation=0.1)}, "mtl20 must be with .*, got omniglot and 0.1"),
        ({"epoch_steps": 0}, "epoch_steps must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DagTrainConfig(**changes)


def test_a_flow_that_reaches_past_the_graph_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"flow must be in 1\.\.states - 1 = 4, got 5"):
        train(tiny(tmp_path, network=DagNetworkConfig(states=5, flow=5, channels=8, trunk_size=4)))


def test_the_folder_of_another_network_is_refused(tmp_path):
    train(tiny(tmp_path / "run"))
    other = DagNetworkConfig(states=5, flow=3, channels=8, trunk_size=4)
    with pytest.raises(ValueError, match=r"must hold the weights of this network"):
        train(tiny(tmp_path / "other", start=tmp_path / "run", network=other))
    with pytest.raises(ValueError, match=r"network\.flow must stay 2"):
        train(tiny(tmp_path / "run", network=other), resume=True)


def test_costs_are_those_of_the_extracted_network(tmp_path):
    model = train(tiny(tmp_path))
    for cost in task_costs(model):
        edges = sum(cost.kept.edges)
        classes = next(task.classes for task in model.tasks if task.name == cost.task)
        assert cost.flops == 2 * 9 * 8 * 16 + edges * 2 * 9 * 8 * 8 * 16 + 2 * 8 * classes
        assert cost.parameters == 9 * 8 + 16 + edges * (9 * 64 + 16) + 16 + 9 * classes
    used = len(model.used_edges())
    assert deployed_parameters(model) - used * (9 * 64 + 16) < 3 * (9 * 8 + 16 + 16 + 9 * 4 + 7 + 10)


def test_evaluation_counts_what_is_right(tmp_path, three_tasks):
    model = train(tiny(tmp_path))
    blank = ImageSet(
        "low", torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1, 2, 2, 2, 2]), 3, (0.3,), (0.4,)
    )
    with torch.no_grad():
        answer = model(blank.inputs(slice(0, 1)), "low").argmax().item()
    result = evaluate_tasks(model, [blank], batch_size=3)["low"]
    assert result.accuracy == (blank.labels == answer).double().mean().item()
    assert result.images == 8


def test_report_of_several_runs(tmp_path):
    train(tiny(tmp_path / "flow"))
    train(
        tiny(tmp_path / "random", start=tmp_path / "flow", reduction=ReductionConfig(ranking="random", norm_batches=3))
    )
    runs = (tmp_path / "flow", tmp_path / "random")
    text = report(DagReportConfig(runs=runs, markdown=tmp_path / "docs" / "dag.md"))
    assert "| flow-based reduction |" in text
    assert "**Warning**" in text
    written = (tmp_path / "docs" / "dag.md").read_text()
    assert written.endswith(text)
    assert re.search("den dag train dag-omniglot --out runs/random .*--start runs/flow", written)
    assert matplotlib.image.imread(tmp_path / "flow" / "graph.png").shape[0] > 300
    found = [measure(path, time=False) for path in runs]
    gap = 100 * (found[0].accuracy - found[1].accuracy)
    assert f"{gap:+.2f}, 1 seed, so no interval" in comparison(found)
    assert ": after 10 updates flow-based reduction more accurate than random reduction" in text
    for run in found:
        run.chance.clear()
    assert "- open: after 10 updates flow-based reduction more accurate than random reduction" in verdicts(found)


def test_runs_of_other_settings_stand_apart(tmp_path):
    train(tiny(tmp_path / "flow"))
    network = dataclasses.replace(tiny(tmp_path).network, channels=4)
    for name, channels in (("hard", tiny(tmp_path).network), ("narrow", network)):
        train(tiny(tmp_path / name, mode="hard", network=channels))
    found = [measure(tmp_path / name, time=False) for name in ("flow", "hard", "narrow")]
    assert [run.label(found[0]) for run in found] == [
        "flow-based reduction", "hard sharing", "hard sharing, channels 4",
    ]  # fmt: skip
    rows = comparison(found).splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == [run.label(found[0]) for run in found]
    assert verdicts(found).count("1 seed, so no interval") == 2


def test_the_command_of_a_run_makes_its_settings(tmp_path):
    from den.commands import parse

    config = tiny(tmp_path, {"search": "joint"})
    words = command_of(config).replace(f"runs/{tmp_path.name}", str(tmp_path)).split()
    assert parse([*words[1:], "--no-progress"]).settings == config


def test_figure_has_a_panel_per_task_and_twenty_colours():
    graph, gates = Graph(8, 3), TaskGates([0.5] * 8, [0.5] * 8, [0.5] * 18)
    kept = {f"task {k}": reduce(graph, gates, 0.5, ranking="random", seed=k).kept for k in range(20)}
    figure = graph_figure(graph, kept)
    assert len(figure.axes) == 21
    assert len({task_colour(k) for k in range(20)}) == 20


def test_command_line_trains_resumes_and_reports(tmp_path, capsys):
    out = tmp_path / "run"
    train(tiny(out))
    (out / "config.json").write_text(json.dumps(json.loads((out / "config.json").read_text())))
    assert main(["dag", "train", "--resume", "--out", str(out)]) == 0
    assert main(["dag", "report", str(out), "--no-time"]) == 0
    assert "different topologies among 3 tasks" in capsys.readouterr().out
    assert main(["dag", "train", "--out", str(out), "--no-progress"]) == 2
    assert "continue it with --resume" in capsys.readouterr().err


def test_coarse_labels_make_tasks_of_the_fine_labels_under_them():
    fine = ImageSet(
        "all", torch.zeros(6, 1, 4, 4, dtype=torch.uint8), torch.tensor([7, 2, 7, 5, 9, 2]), 10, (0.5,), (0.5,)
    )
    first, second = by_coarse_label(fine, torch.tensor([0, 0, 0, 1, 1, 0]))
    assert (first.labels.tolist(), first.classes) == ([1, 0, 1, 0], 2)
    assert (second.labels.tolist(), second.classes, second.name) == ([0, 1], 2, "coarse1")


def test_checkpoints_hold_the_gates(tmp_path):
    train(tiny(tmp_path))
    tensors, record = load_checkpoint(tmp_path / "last.safetensors")
    assert tensors["model.gates.edge_levels"].shape == (3, 7)
    assert record["reduced"]
