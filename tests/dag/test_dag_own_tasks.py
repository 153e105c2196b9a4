"""Tasks of a user's own: the page of the docs runs, loaders, kinds, folders, and errors that say what was expected."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from den.cli import main
from den.dag import Kind, OwnTask, register_kind
from den.dag.config import DagDataConfig, DagNetworkConfig, DagTrainConfig, DagTraining, ReductionConfig
from den.dag.kinds import KINDS, ClassMetrics
from den.dag.scenarios import load_tasks
from den.data.loaders import LoaderBatches, halves, loader_sets
from den.nn.tasks import TASK_KINDS, Task
from den.recipes.dag import fit
from den.recipes.dag.recipe import load_network
from den.train.folder import read_metrics
from tests.small_runs import assert_same_weights, train_interrupted

PAGE = Path(__file__).resolve().parents[2] / "docs" / "your-tasks.md"
pytestmark = pytest.mark.filterwarnings("ignore:the gates of some tasks differ little")


@pytest.fixture(autouse=True)
def kinds_of_before():
    """Forgets the kinds that a test registers."""
    kinds, shapes = dict(KINDS), dict(TASK_KINDS)
    yield
    for known, before in ((KINDS, kinds), (TASK_KINDS, shapes)):
        known.clear()
        known.update(before)


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(code, names)
    results = names["fitted"].results
    assert results["digit"].accuracy > 0.8
    assert results["odd"].accuracy > 0.8
    assert results["ink"].metrics["error"] < 0.5 * (names["ink"] - names["ink"].mean()).abs().mean()
    assert capsys.readouterr().out.count("edges") == 3
    torch.testing.assert_close(names["alone"](names["images"][:4]), names["fitted"].model(names["images"][:4], "digit"),
                               rtol=1e-4, atol=1e-4)  # fmt: skip


def rows(count=40, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, size, size, generator=generator)
    return [(images[i], {"sign": torch.tensor(i % 2), "three": torch.tensor(i % 3)}) for i in range(count)]


def tiny(out, **training):
    return DagTrainConfig(
        out=out,
        epoch_steps=3,
        progress=False,
        network=DagNetworkConfig(states=4, flow=2, channels=8, trunk_size=4),
        training=DagTraining(**{"steps": 10, "shares": (0.2, 0.5, 0.3), **training}),
        reduction=ReductionConfig(norm_batches=2),
    )


TASKS = {"sign": OwnTask(2), "three": OwnTask(3)}


@pytest.mark.parametrize("broken_off_at", [4, 9])
def test_a_run_on_loaders_continues_to_the_same_weights(tmp_path, monkeypatch, broken_off_at):
    def loader():
        return DataLoader(rows(), batch_size=8, shuffle=True, drop_last=True)

    def run(config, resume=False):
        return fit(TASKS, loader(), loader(), config, resume=resume).model

    whole, config = run(tiny(tmp_path / "whole")), tiny(tmp_path / "broken")
    train_interrupted(config, monkeypatch, broken_off_at, run)
    torch.manual_seed(broken_off_at)  # where the process stands does not matter
    assert_same_weights(run(config, resume=True), whole)
    first, second = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "broken")
    assert first == second
    assert set(first[-1]["held_out"]) == {"sign", "three"}


def test_a_loader_for_each_task_and_a_head_loss_and_metric_of_its_own(tmp_path):
    class Lowered(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.linear = nn.Linear(channels, 3)

        def forward(self, pooled):
            return self.linear(pooled) - 1

    seen = []

    def loss(outputs, targets):
        seen.append(outputs.detach())
        return nn.functional.cross_entropy(outputs, targets)

    loaders = {
        "sign": DataLoader([(x, y["sign"]) for x, y in rows()], batch_size=8, shuffle=True),
        "three": DataLoader([(x, y["three"]) for x, y in rows(30, 16)], batch_size=6, shuffle=True),
    }
    three = OwnTask(3, loss=loss, head=lambda task, config: Lowered(config.channels))
    fitted = fit({"sign": OwnTask(2), "three": three}, loaders, loaders, tiny(tmp_path, search="joint"))
    assert isinstance(fitted.model.heads[1], Lowered)
    assert [task.shape for task in fitted.model.tasks] == [(1, 8, 8), (1, 16, 16)]
    assert seen
    assert fitted.results["three"].images == 30
    again = load_network(tmp_path / "last.safetensors")
    assert torch.equal(again.heads[1].linear.weight, fitted.model.heads[1].linear.weight)
    del KINDS["classification of three"], TASK_KINDS["classification of three"]  # as in another process
    with pytest.raises(ValueError, match="your own kinds have to be registered first"):
        load_network(tmp_path / "last.safetensors")


def test_halves_hold_different_images_and_draw_anew():
    [whole] = loader_sets(DataLoader(rows(), batch_size=8), (Task("sign", 2, 8, 1), Task("three", 3, 8, 1)))
    parts = halves(whole, seed=0)
    drawn = [{x.numpy().tobytes() for batch in part.batches() for x in batch[0][1]} for part in parts]
    assert not drawn[0] & drawn[1]
    assert len(drawn[0]) == len(drawn[1]) == 16  # of twenty, in batches of eight
    stream = LoaderBatches([parts[0]], seed=0)
    passes = [torch.cat([stream.next().images[0] for _ in range(2)]) for _ in range(2)]
    assert not torch.equal(*passes)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(rows())


@pytest.mark.parametrize(
    ("tasks", "train", "message"),
    [
        ({}, DataLoader(rows()), "tasks must be at least one"),
        (TASKS, {"sign": DataLoader(rows())}, "train must have a loader for 'three', got sign"),
        ({"sign": OwnTask(2)}, DataLoader([1, 2]), r"images of sign must be float \[B, C, H, W\]"),
        ({"sign": OwnTask(2), "four": OwnTask(4)}, DataLoader(rows(), batch_size=8), "targets of sign, four, got"),
        ({"sign": OwnTask(2, kind="odd")}, DataLoader(rows()), "kind of 'sign' must be one of classification"),
        ({"sign": OwnTask(2)}, DataLoader(Endless(), batch_size=8), "data set of positions"),
        ({"sign": OwnTask(2)}, DataLoader([]), "must give at least one batch, got none"),
    ],
)
def test_what_does_not_fit_is_explained(tmp_path, tasks, train, message):
    with pytest.raises(ValueError, match=message):
        fit(tasks, train, config=tiny(tmp_path / "run"))


def test_a_name_stands_for_one_kind():
    kind = Kind(nn.functional.mse_loss, lambda task: ClassMetrics(), values=2)
    register_kind("pair", kind)
    register_kind("pair", kind)
    with pytest.raises(ValueError, match="classes of 'x' must be 2 for pair, got 3"):
        Task("x", 3, 8, kind="pair")
    with pytest.raises(ValueError, match=r"name must not be one of classification, .*, pair, got 'pair'"):
        register_kind("pair", dataclasses.replace(kind, dense=True))


def write_pictures(root, name, split, classes):
    for label, kind in enumerate(classes):
        (root / name / split / kind).mkdir(parents=True)
        for i in range(6):
            shade = np.full((20, 30, 3), 60 * label + 5 * i, np.uint8)
            Image.fromarray(shade).save(root / name / split / kind / f"{i}.png")


def write_scenes(place, count=4):
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder in ("image", "label", "depth"):
            (place / split / folder).mkdir(parents=True)
        for i in range(count):
            np.save(place / split / "image" / f"{i}.npy", generator.random((16, 24, 3), np.float32))
            np.save(place / split / "label" / f"{i}.npy", generator.integers(-1, 5, (16, 24)))
            np.save(place / split / "depth" / f"{i}.npy", 100 * generator.random((16, 24), np.float32))


def test_folders_of_pictures_and_known_sets_are_tasks(tmp_path):
    write_pictures(tmp_path, "animals", "train", ("cat", "dog", "owl"))
    write_pictures(tmp_path, "animals", "val", ("cat", "dog", "owl"))
    data = DagDataConfig(tasks=("digits,folder:animals",), root=tmp_path, size=8)
    assert data.scenario == "own"
    digits, animals = load_tasks(data, "test")
    assert [(each.name, each.images.shape[-1]) for each in (digits, animals)] == [("digits", 8), ("animals", 8)]
    assert animals.class_names == ("cat", "dog", "owl")
    assert len(load_tasks(data, "train")[1]) == 18
    with pytest.raises(ValueError, match="must have different names, got digits twice"):
        load_tasks(DagDataConfig(tasks=("digits", "digits")), "train")
    with pytest.raises(ValueError, match=r"tasks must name the tasks .* got none"):
        load_tasks(DagDataConfig("own"), "train")
    with pytest.raises(ValueError, match="folder:nothing must be there"):
        load_tasks(DagDataConfig(tasks=("folder:nothing",), root=tmp_path), "train")


@pytest.mark.filterwarnings("ignore:.*as if there were")
def test_folders_of_scenes_are_dense_tasks_and_train_from_the_command_line(tmp_path, capsys):
    write_scenes(tmp_path / "rooms")
    data = DagDataConfig(tasks=("folder:rooms",), root=tmp_path)
    [scenes] = load_tasks(data, "train")
    assert [(task.name, task.kind, task.classes) for task in scenes.tasks] == [
        ("segmentation", "segmentation", 5), ("depth", "depth", 1),
    ]  # fmt: skip
    both = load_tasks(dataclasses.replace(data, tasks=("digits", "folder:rooms")), "test")
    assert [task.name for each in both for task in each.tasks] == ["digits", "rooms-segmentation", "rooms-depth"]
    words = (
        "dag train --data.tasks folder:rooms --data.batch-size 2 --training.steps 4 --network.states 3 --network.flow 1"
        " --network.channels 8 --reduction.norm-batches 1 --no-progress"
    )
    out = tmp_path / "run"
    assert main([*words.split(), "--data.root", str(tmp_path), "--out", str(out)]) == 0
    assert main(["dag", "report", str(out), "--no-time"]) == 0
    assert "segmentation: miou" in capsys.readouterr().out
