"""Algorithm 1: phases, structures, steering, and one training on real images from end to end."""

import dataclasses
import json

import pytest
import torch

from den.data import ImageSet, load_set
from den.evaluate.accuracy import evaluate
from den.nn.model import create_model
from den.recipes import prepare
from den.recipes.den import derive_structures, sparsity_weights, train
from den.recipes.setup import estimator_optimiser, hold_out
from den.train.checkpoint import load_checkpoint, load_model
from den.train.config import DataConfig, EstimatorTraining, PhaseConfig, SelectorTraining
from den.train.engine import Engine
from den.train.folder import read_metrics, stored_config
from den.train.objective import STEERING
from den.train.phases import run_phases, schedule_factor
from tests.small_runs import alternating_config, cut_sets


@pytest.fixture
def small_sets(monkeypatch):
    cut_sets(monkeypatch)


def test_phases_follow_algorithm_1(tmp_path):
    phases = [
        (p.network, p.stage, p.settings.steps, p.factor) for p in run_phases(alternating_config(tmp_path, stages=3))
    ]
    assert phases == [
        ("estimator", 1, 4, 1.0), ("selector", 1, 5, 1.0),
        ("estimator", 2, 3, 1.0), ("selector", 2, 5, 0.5),
        ("estimator", 3, 3, 0.5), ("selector", 3, 5, 0.25),
        ("estimator", 4, 2, 1.0),
    ]  # fmt: skip


def test_dense_run_is_the_first_phase_only(tmp_path):
    assert [(p.network, p.stage) for p in run_phases(alternating_config(tmp_path, mode="dense"))] == [("estimator", 1)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("cosine", [1, 0.5, 0.146447, 0]), ("step", [1, 0.1, 0.01, 0.01]), ("constant", [1, 1, 1, 1])],
)
def test_schedules(schedule, expected):
    assert [schedule_factor(schedule, p) for p in (0, 0.5, 0.75, 1)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("decay_all", [True, False])
def test_weight_decay_can_spare_biases_and_norms(decay_all):
    model = create_model("wrn8_1", [load_set("digits", "test").task], trunk_size=8)
    optimiser = estimator_optimiser(model.estimator, EstimatorTraining(decay_all=decay_all))
    decayed = {id(p) for group in optimiser.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    held = {id(p) for group in optimiser.param_groups for p in group["params"]}
    parameters = list(model.estimator.parameters())
    assert held == {id(p) for p in parameters}
    assert decayed == {id(p) for p in parameters if p.ndim > 1 or decay_all}


def test_run_folder_holds_settings_versions_metrics_events_and_checkpoints(tmp_path, small_sets):
    config = alternating_config(tmp_path / "run")
    train(config)
    assert stored_config(config.out) == config
    assert {"torch", "numpy", "python", "den-kernels"} <= json.loads((config.out / "versions.json").read_text()).keys()
    assert {p.name for p in config.out.iterdir()} == {
        "config.json", "versions.json", "metrics.jsonl", "events", "last.safetensors", "best.safetensors"
    }  # fmt: skip
    assert any(p.stat().st_size > 1000 for p in (config.out / "events").iterdir())
    lines = read_metrics(config.out)
    assert [(line["epoch"], line["step"], line["phase"], line["stage"]) for line in lines] == [
        (1, 3, "estimator", 1), (2, 4, "estimator", 1), (3, 7, "selector", 1), (4, 9, "selector", 1),
        (5, 12, "estimator", 2), (6, 15, "selector", 2), (7, 17, "selector", 2), (8, 19, "estimator", 3),
    ]  # fmt: skip
    for line in lines:
        assert line["held_out"].keys() == {"digits", "fashion"}
        for report in line["held_out"].values():
            assert 0 <= report["accuracy"] <= 1
            assert 0 <= report["flops_ratio"] <= 1
            assert report["structures"] >= 1
            assert 0 <= report["entropy"] <= report["mean_entropy"] + 1e-5
    assert load_checkpoint(config.out / "last.safetensors")[1]["position"]["total_steps"] == 19


def test_phase_ends_when_the_loss_no_longer_falls(tmp_path, small_sets):
    """With a rate of 0 the loss cannot fall, whatever the most steps are."""
    first = PhaseConfig(steps=1000, rate=0.0, until="converge", patience=2, tolerance=0.5)
    config = alternating_config(tmp_path / "run", mode="dense", estimator=EstimatorTraining(first=first))
    train(config)
    assert [line["step"] for line in read_metrics(config.out)] == [3, 6, 9]


def test_dense_run_trains_the_same_estimator_at_full_structure(tmp_path, small_sets):
    config = alternating_config(tmp_path / "run", mode="dense")
    with Engine(config, prepare) as engine:
        initial = {name: t.clone() for name, t in engine.model.selector.state_dict().items()}
    model = train(dataclasses.replace(config, out=tmp_path / "again"))
    assert all(torch.equal(t, initial[name]) for name, t in model.selector.state_dict().items())
    for line in read_metrics(tmp_path / "again"):
        assert all(report["flops_ratio"] == 1.0 for report in line["held_out"].values())


def test_later_structures_mix_those_of_the_selector_with_equation_8(tmp_path, small_sets):
    estimator = EstimatorTraining(structures="argmax", initial_share=0.25, tau=0.0)
    with Engine(
        alternating_config(tmp_path / "run", estimator=estimator, data=DataConfig(batch_size=60)), prepare
    ) as engine:
        with torch.no_grad():
            for head in engine.model.selector.heads:
                head.weight.zero_()
                head.bias.view(-1, 4).copy_(torch.tensor([0.0, 5.0, 0.0, 0.0]))
        engine.model.eval()
        batch = engine.batches["all"].next()
        chosen = torch.cat([derive_structures(engine, 2, batch) for _ in range(30)])
    share = (chosen == 1).all(1).float().mean().item()
    assert share == pytest.approx(0.75 + 0.25 / 4**3, abs=0.04)


def test_loss_that_is_not_finite_stops_the_run(tmp_path, small_sets):
    estimator = EstimatorTraining(first=PhaseConfig(steps=50, rate=1e30, schedule="constant"))
    with pytest.raises(ValueError, match=r"loss must stay finite, got (nan|inf) at step \d+ \(lower the rate\)"):
        train(alternating_config(tmp_path / "run", estimator=estimator))


def test_budget_steers_every_task_to_its_flops(tmp_path):
    """From a rho that alone would save next to nothing; the estimator is left untrained."""
    torch.set_num_threads(1)
    budget = 0.25
    config = alternating_config(
        tmp_path / "run",
        stages=1,
        epoch_steps=150,
        data=DataConfig(batch_size=32),
        estimator=EstimatorTraining(first=PhaseConfig(steps=1, rate=0.0)),
        selector=SelectorTraining(phase=PhaseConfig(steps=150, rate=1e-2), rho=0.01, budget=budget),
    )
    sets = [load_set(name, "test").subset(torch.arange(300)) for name in config.data.tasks]
    for report in evaluate(train(config), sets).values():
        assert report.flops_ratio == pytest.approx(budget, rel=0.3)


def test_weights_of_the_sparsity_term_are_of_their_task(tmp_path, small_sets):
    """The first task at its full structure, the second at none; measuring them leaves the selector as it was."""
    with Engine(
        alternating_config(tmp_path / "run", selector=SelectorTraining(rho=0.1, budget=0.5)), prepare
    ) as engine:
        with torch.no_grad():
            for head, level in zip(engine.model.selector.heads, (3, 0), strict=True):
                head.bias.view(-1, 4)[:, level] = 100.0
        before = {name: t.clone() for name, t in engine.model.selector.state_dict().items()}
        batch = engine.batches["all"].next()
        weights = sparsity_weights(engine, batch)
        assert weights.shape == (len(batch), 1)
        assert weights.flatten().tolist() == pytest.approx(
            [0.1 * STEERING] * len(batch.labels[0]) + [0.1 / STEERING] * len(batch.labels[1])
        )
        assert engine.model.selector.training
        assert all(torch.equal(t, before[name]) for name, t in engine.model.selector.state_dict().items())
    with Engine(alternating_config(tmp_path / "steady"), prepare) as engine:
        assert sparsity_weights(engine, batch) == engine.config.selector.rho


def test_held_out_images_are_not_trained_on(tmp_path):
    sets = [load_set("digits", "train")]
    kept, held = hold_out(sets, alternating_config(tmp_path, data=DataConfig(tasks=("digits",), validation=0.1)))
    assert (len(kept[0]), len(held[0])) == (1437 - 144, 144)
    whole, test = hold_out(sets, alternating_config(tmp_path, data=DataConfig(tasks=("digits",), validation=0.0)))
    assert (len(whole[0]), len(test[0])) == (1437, 360)


def test_sets_with_one_class_missing_still_train(tmp_path, monkeypatch):
    whole = load_set("digits", "train")
    part = whole.subset((whole.labels != 4).nonzero().flatten()[:50])
    monkeypatch.setattr("den.recipes.setup.load_set", lambda name, split, root: part)
    assert isinstance(part, ImageSet)
    train(alternating_config(tmp_path / "run", mode="dense", data=DataConfig(tasks=("digits",), batch_size=10)))


def test_training_on_real_images_learns_both_tasks_and_saves_flops(tmp_path):
    """From end to end, 8x8 digits and 28x28 Fashion-MNIST in one network of three blocks."""
    torch.set_num_threads(1)
    config = alternating_config(
        tmp_path / "run",
        stages=1,
        epoch_steps=75,
        data=DataConfig(batch_size=64),
        estimator=EstimatorTraining(first=PhaseConfig(steps=150, rate=0.1)),
        selector=SelectorTraining(phase=PhaseConfig(steps=150, rate=3e-3), rho=0.5),
    )
    model = train(config)
    sets = [load_set(name, "test") for name in config.data.tasks]
    selected, full = evaluate(model, sets), evaluate(model, sets, "full")
    assert full["digits"].accuracy > 0.85
    assert full["fashion"].accuracy > 0.65
    for name in config.data.tasks:
        assert selected[name].accuracy > full[name].accuracy - 0.15
    assert sum(report.flops_ratio for report in selected.values()) / 2 < 0.9
    assert not torch.allclose(selected["digits"].probabilities, selected["fashion"].probabilities, atol=0.01)
    costs = [line["train"]["loss"] for line in read_metrics(config.out) if line["phase"] == "selector"]
    assert costs[-1] < costs[0]
    reloaded = evaluate(load_model(config.out / "last.safetensors"), sets)
    assert {k: r.accuracy for k, r in reloaded.items()} == {k: r.accuracy for k, r in selected.items()}
