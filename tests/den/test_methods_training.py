"""The compared methods from end to end: phases, exact continuation, checkpoints, evaluation."""

import dataclasses
from typing import get_args

import pytest
import torch

from den.data import load_set
from den.evaluate.accuracy import evaluate, full_flops
from den.nn.model import create_model
from den.nn.tasks import Task
from den.recipes import METHODS, load_method, method_of, prepare
from den.recipes.den import train
from den.runs.trained import open_run
from den.support.settings import from_dict
from den.train.checkpoint import load_checkpoint
from den.train.config import (
    DataConfig,
    EstimatorTraining,
    MethodConfig,
    Mode,
    NetworkConfig,
    PhaseConfig,
    SelectorTraining,
    TrainConfig,
)
from den.train.engine import Engine
from den.train.folder import read_metrics
from tests.small_runs import cut_sets, small_config, train_interrupted

INTERRUPTED_AT = {
    "random": (4,), "nestednet": (0,), "packnet": (4, 7), "routing": (4,), "cross-stitch": (4,),
    "blockdrop": (7, 12), "adashare": (4, 12, 15),
}  # fmt: skip
CASES = [(mode, at) for mode, places in INTERRUPTED_AT.items() for at in places]


@pytest.fixture(autouse=True)
def small_sets(monkeypatch):
    cut_sets(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """mode -> the settings of a run from beginning to end, trained when first asked for."""
    runs = {}

    def run(mode):
        if mode not in runs:
            config = small_config(tmp_path_factory.mktemp(mode) / "run", mode)
            runs[mode] = config, train(config).state_dict()
        return runs[mode]

    return run


def test_every_method_is_tried():
    assert INTERRUPTED_AT.keys() == METHODS.keys()
    assert set(get_args(Mode)) == {"den", "dense", *METHODS}


@pytest.mark.parametrize(("mode", "at"), CASES)
def test_continued_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, finished, mode, at):
    broken = small_config(tmp_path / "broken", mode)
    whole, expected = finished(mode)
    train_interrupted(broken, monkeypatch, at)
    found = train(broken, resume=True).state_dict()
    assert read_metrics(broken.out) == read_metrics(whole.out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for checkpoint in ("last", "best"):
        tensors, record = load_checkpoint(whole.out / f"{checkpoint}.safetensors")
        again, record_again = load_checkpoint(broken.out / f"{checkpoint}.safetensors")
        assert record["position"] == record_again["position"]
        assert all(torch.equal(again[name], t) for name, t in tensors.items())


@pytest.mark.parametrize("mode", METHODS)
def test_opened_run_is_evaluated_at_its_structures(finished, mode):
    """Accuracy and FLOPs by hand, image by image; the last epoch was measured at the same structures."""
    config, _ = finished(mode)
    run = open_run(config.out)
    image_set = load_set("digits", "test").subset(torch.arange(40))
    report = evaluate(run.model, [image_set], run.choice)["digits"]
    levels = run.structures(image_set.inputs(), "digits")
    assert torch.equal(report.levels, torch.full((40, 3), 3) if levels is None else levels)
    with torch.no_grad():
        logits = run.model.estimator(image_set.inputs(), "digits", levels)
    assert report.accuracy == pytest.approx((logits.argmax(1) == image_set.labels).double().mean().item())
    by_hand = run.model.estimator.level_flops[torch.arange(3), report.levels].sum(1).double().mean().item()
    assert report.flops == by_hand
    assert report.flops_ratio == pytest.approx(by_hand / full_flops(run.model))
    logged = read_metrics(config.out)[-1]["held_out"]["digits"]
    if mode not in ("random", "blockdrop"):  # one structure for each task
        assert logged["flops"] == report.flops


@pytest.mark.parametrize("mode", METHODS)
def test_structures_of_a_mixed_batch_are_those_of_its_parts(tmp_path, mode):
    with Engine(small_config(tmp_path / "run", mode), prepare) as engine:
        model, method = engine.model.eval(), engine.recipe
        batch = engine.batches["all"].next()
        together = method.structures(batch.images, batch.tasks)
        if together is None:
            return
        assert (together.shape, together.dtype) == ((len(batch), model.num_blocks), torch.int64)
        if mode == "random":
            return
        parts = [method.structures(images, task) for images, task in zip(batch.images, batch.tasks, strict=True)]
        assert torch.equal(together, torch.cat(parts))


@pytest.mark.parametrize("mode", METHODS)
def test_best_is_chosen_where_epochs_can_be_compared(tmp_path, mode):
    with Engine(small_config(tmp_path / "run", mode), prepare) as engine:
        comparable = [engine.recipe.comparable(phase) for phase in engine.phases]
    assert comparable == [False] * (len(comparable) - 1) + [True]


def test_phases_of_the_methods(tmp_path):
    found = {}
    for mode in METHODS:
        config = small_config(tmp_path / mode, mode, methods=MethodConfig(share_rounds=4))
        with Engine(config, prepare) as engine:
            found[mode] = [(p.network, p.stage, p.settings.steps) for p in engine.phases]
    alone = [("estimator", 1, 5)]
    assert found == {
        "random": alone, "nestednet": alone, "routing": alone, "cross-stitch": alone,
        "packnet": [*alone, ("estimator", 2, 5)],
        "blockdrop": [*alone, ("selector", 1, 6), ("both", 2, 3)],
        "adashare": [
            ("estimator", 1, 1), ("selector", 1, 1), ("estimator", 2, 2), ("selector", 2, 2),
            ("estimator", 3, 1), ("selector", 3, 1), ("estimator", 4, 2), ("selector", 4, 2), ("estimator", 5, 5),
        ],
    }  # fmt: skip


def test_checkpoint_of_another_method_is_refused(finished):
    config, _ = finished("routing")
    with pytest.raises(ValueError, match="must hold the weights of this network"):
        load_method(config.out / "last.safetensors", dataclasses.replace(config, mode="adashare"))


TASKS = [Task("a", 3, 8, 1), Task("b", 4, 8, 1)]


@pytest.mark.parametrize(
    ("mode", "tasks", "methods", "message"),
    [
        ("nestednet", 4, {}, r"nestednet: tasks must be at most 3, the levels that keep a channel, got 4 .*levels\)"),
        ("packnet", 4, {}, r"packnet: tasks must be at most 3, the levels that keep a channel, got 4"),
        (
            "nestednet",
            2,
            {"levels": (0, 3)},
            r"methods\.levels must be 2 different levels of \[1, 2, 3\], got \[0, 3\]",
        ),
        ("packnet", 2, {"levels": (2, 2)}, r"packnet: methods\.levels must be 2 different levels .*, got \[2, 2\]"),
        ("nestednet", 2, {"levels": (2,)}, r"methods\.levels must be 2 different levels .*, got \[2\]"),
        ("adashare", 2, {"share_rounds": 7}, r"adashare: methods\.share_rounds must be at most 6 .*, got 7"),
    ],
)
def test_settings_that_do_not_fit_the_network(tmp_path, mode, tasks, methods, message):
    model = create_model("wrn8_1", [Task(f"task{k}", 3, 8, 1) for k in range(tasks)], trunk_size=8)
    with pytest.raises(ValueError, match=message):
        method_of(model, small_config(tmp_path, mode, methods=MethodConfig(**methods)))


@pytest.mark.parametrize("mode", ["blockdrop", "adashare"])
def test_blocks_that_cannot_be_left_out_are_refused(tmp_path, mode):
    model = create_model("wrn8_1", TASKS, trunk_size=8)
    model.estimator.level_parameters[:, 0] = 9  # as where the lowest level keeps a group
    with pytest.raises(ValueError, match=rf"{mode}: backbone must be of residual blocks, .*, got wrn8_1"):
        method_of(model, small_config(tmp_path, mode))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "oracle"}, r"config\.mode: value must be one of \['den', 'dense', .*'adashare'\], got 'oracle'"),
        ({"methods": {"drop_bound": 0.3}}, r"config: methods\.drop_bound must be in 0\.5\.\.1, got 0\.3"),
        ({"methods": {"share_rounds": 0}}, r"config: methods\.share_rounds must be at least 1, got 0"),
        ({"methods": {"stitch": 2}}, r"config: methods\.stitch must be in 0\.\.1, got 2"),
        ({"methods": {"random_flops": -1}}, r"config: methods\.random_flops must be in 0\.\.1, got -1"),
    ],
)
def test_settings_that_are_wrong(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(TrainConfig, values)


@pytest.mark.parametrize("mode", ["nestednet", "packnet", "routing"])
def test_training_on_real_images_learns(tmp_path, monkeypatch, mode):
    """Static structures, 8x8 digits: a network of three blocks in a few seconds."""
    torch.set_num_threads(1)
    cut_sets(monkeypatch, 1400)
    config = small_config(
        tmp_path / "run",
        mode,
        epoch_steps=40,
        data=DataConfig(tasks=("digits",), batch_size=32),
        network=NetworkConfig(backbone="wrn8_1", trunk_size=8, levels=3),
        estimator=EstimatorTraining(first=PhaseConfig(steps=40, rate=0.1)),
    )
    train(config)
    report = evaluate((run := open_run(config.out)).model, [load_set("digits", "test")], run.choice)["digits"]
    assert report.accuracy > 0.5


@pytest.mark.parametrize("mode", ["blockdrop", "adashare"])
def test_gates_learn_to_skip_blocks_and_still_answer(tmp_path, monkeypatch, mode):
    torch.set_num_threads(1)
    cut_sets(monkeypatch, 1400)
    config = small_config(
        tmp_path / "run",
        mode,
        epoch_steps=80,
        data=DataConfig(tasks=("digits",), batch_size=32),
        estimator=EstimatorTraining(first=PhaseConfig(steps=40, rate=0.1), finish=PhaseConfig(steps=20, rate=0.02)),
        selector=SelectorTraining(phase=PhaseConfig(steps=30, rate=2e-2)),
        methods=MethodConfig(share_rounds=3, share_sparsity=0.5),
    )
    train(config)
    report = evaluate((run := open_run(config.out)).model, [load_set("digits", "test")], run.choice)["digits"]
    assert report.flops_ratio < 0.9
    assert report.accuracy > 0.5


def test_a_den_runs_estimator_can_be_given_a_random_selector(tmp_path):
    model = create_model("wrn8_1", [load_set("digits", "test").task], trunk_size=8)
    rule = METHODS["random"](model, dataclasses.replace(TrainConfig(), seed=3)).structures
    images = load_set("digits", "test").subset(torch.arange(300))
    report = evaluate(model, [images], rule)["digits"]
    assert report.structures > 50
    assert report.flops_ratio == pytest.approx((0 + 0.25 + 0.5 + 1) / 4, abs=0.03)
