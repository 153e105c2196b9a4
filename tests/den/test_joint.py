"""Several labels of the same images: one split of the images, one structure for an image, one head for a label."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from den import cli
from den.data import ImageSet, MixedTaskBatches, load_set
from den.data import sets as sets_module
from den.data.batches import Batch
from den.data.images import Labels, split_by_image, stratified_split
from den.nn.task_batch import task_batch
from den.recipes.den import train
from den.recipes.setup import load_sets, new_model
from den.runs.trained import open_run
from den.train.config import DataConfig, NetworkConfig, TrainConfig
from den.train.folder import read_metrics
from den.train.objective import instance_losses, structure_costs
from den.train.scenarios import SCENARIOS, scenario_config
from tests.small_methods import model_and_batch
from tests.small_runs import small_config


def made_set(name, labels, classes, source="", ids=None):
    images = torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8)
    return ImageSet(name, images, labels, classes, (0.0,), (1.0,), source=source, ids=ids)


@given(st.integers(0, 99), st.integers(20, 60), st.floats(0.05, 0.5))
def test_an_image_is_on_one_side_of_all_sets(seed, count, share):
    generator = torch.Generator().manual_seed(seed)
    fine = torch.randint(6, (count,), generator=generator)
    part = torch.randperm(count, generator=generator)[: count // 2].sort().values
    sets = [made_set("coarse", fine // 2, 3, "s"), made_set("fine", fine, 6, "s")]
    sets += [made_set("part", fine[part], 6, "s", part), made_set("other", fine, 6, "t")]
    splits = split_by_image(sets, share, seed)
    held = [set(s.places[h].tolist()) for s, (_, h) in zip(sets, splits, strict=True)]
    kept = [set(s.places[k].tolist()) for s, (k, _) in zip(sets, splits, strict=True)]
    assert held[0] == held[1]
    assert not any(held[a] & kept[b] for a in range(3) for b in range(3))
    assert all(len(k) + len(h) == len(s) for k, h, s in zip(kept, held, sets, strict=True))
    for position in (1, 3):  # that with the most classes, and one alone, are split as any set is
        alone = stratified_split(sets[position].labels, share, seed)
        assert all(torch.equal(one, other) for one, other in zip(alone, splits[position], strict=True))


@pytest.fixture
def published(monkeypatch, tmp_path):
    """All published sets, each of a few made-up images with labels of every kind."""
    kinds = {
        name: dataclasses.replace(kind, find=lambda *_: None, size=None) for name, kind in sets_module.KINDS.items()
    }
    labels = torch.arange(400)
    made = {"y": labels % 50, "fine": labels % 100, "coarse": labels % 20, "c": labels % 50 // 5, "k": labels % 5}

    def stored(found, root, name):
        count = 10 if name.startswith("stl10") else 50
        return torch.zeros(400, 3, 8, 8, dtype=torch.uint8), made | {"y": labels % count}

    monkeypatch.setattr(sets_module, "KINDS", kinds)
    monkeypatch.setattr(sets_module, "stored", stored)
    return tmp_path


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("name", [*SCENARIOS, "m2-small"])
def test_no_image_of_a_scenario_is_trained_on_and_held_out(published, name, share):
    config = scenario_config(name.partition("-")[0])
    tasks = tuple(task.partition("@")[0] for task in config.data.tasks)
    tasks = tuple(f"tin50-{k}" for k in range(10)) if name == "m2-small" else tasks
    data = dataclasses.replace(config.data, tasks=tasks, root=published, share=share)
    kept, held = load_sets(dataclasses.replace(config, data=data))
    for one in kept:
        for other in held:
            same = one.source == other.source
            assert not (same and set(one.places.tolist()) & set(other.places.tolist())), (one.name, other.name)
            assert len(one)
            assert len(other)


@pytest.fixture
def two_labels(monkeypatch):
    """Two labels of a few images of digits: the digit, and whether it is above four."""
    whole = {split: load_set("digits", split).subset(torch.arange(60)) for split in ("train", "test")}

    def load(name, split, root=None):
        digits = whole[split]
        if name == "digits":
            return digits
        return dataclasses.replace(
            digits, name=name, labels=(digits.labels > 4).long(), classes=2, class_names=("low", "high")
        )

    monkeypatch.setattr("den.recipes.setup.load_set", load)
    monkeypatch.setattr("den.data.load_set", load)
    return load


def joint_batch(load, count=6):
    index = torch.arange(count)
    images = load("digits", "train").inputs(index)
    labels = [load(name, "train").labels[index] for name in ("digits", "high")]
    return Batch(("digits", "high"), [images, images], labels)


def joint_model(load):
    tasks = [load(name, "train").task for name in ("digits", "high")]
    return new_model(NetworkConfig("wrn8_1", trunk_size=8), tasks, seed=0, joint=True)


def test_an_image_is_drawn_once_with_all_its_labels(two_labels):
    sets = [two_labels(name, "train") for name in ("digits", "high")]
    batch = MixedTaskBatches([Labels(sets)], 7).next()
    assert batch.joint
    assert (batch.tasks, batch.count) == (("digits", "high"), 7)
    assert batch.images[0] is batch.images[1]
    assert torch.equal(batch.labels[1], (batch.labels[0] > 4).long())
    with pytest.raises(
        ValueError, match=r"must be labels of the same images, got digits and high \(60 and 59 images\)"
    ):
        Labels([sets[0], sets[1].subset(torch.arange(59))])


def test_the_joint_network_computes_what_each_task_alone_does(two_labels):
    model, batch = joint_model(two_labels).eval(), joint_batch(two_labels)
    assert (len(model.estimator.stems), len(model.selector.stems), len(model.selector.heads)) == (1, 1, 1)
    structures = torch.randint(4, (6, 3))
    with torch.no_grad():
        found = model.estimator.part_logits(batch.for_network(model.positions), structures)
        for logits, task in zip(found, batch.tasks, strict=True):
            torch.testing.assert_close(logits, model.estimator(batch.images[0], task, structures))
        chosen = [model.select(batch.images[0], task) for task in batch.tasks]
    assert torch.equal(*chosen)


def test_a_structure_costs_the_mean_of_the_losses_of_all_labels(two_labels):
    model, batch = joint_model(two_labels).eval(), joint_batch(two_labels)
    structures = torch.randint(4, (6, 2, 3))
    costs = structure_costs(model, batch, structures, 0.0)
    for k in range(2):
        logits = [model.estimator(batch.images[0], task, structures[:, k]) for task in batch.tasks]
        losses = instance_losses(logits, batch.labels).view(2, -1)
        torch.testing.assert_close(costs[:, k], losses.mean(0))


def test_a_network_reads_a_batch_as_its_own_checks_would_give_it(two_labels):
    apart, batch = model_and_batch()
    found = batch.for_network(apart.positions)
    checked = task_batch(batch.images, batch.tasks, apart.tasks, like=batch.images[0])
    assert (found.tasks, found.order, found.form) == (checked.tasks, checked.order, checked.form)
    assert all(one is other for one, other in zip(found.images, checked.images, strict=True))
    joint = joint_batch(two_labels)
    read = joint.for_network(joint_model(two_labels).positions)
    assert (read.tasks, read.form, len(read.images), len(read)) == ((0,), "joint", 1, joint.count)
    assert read.restore_logits(logits := [torch.zeros(6, 10), torch.zeros(6, 2)], 10) is logits


@pytest.mark.parametrize("changes", [{}, {"mode": "dense"}, {"mode": "random"}, {"mode": "nestednet"}])
def test_training_on_two_labels_and_what_is_said_of_it(two_labels, tmp_path, capsys, changes):
    config = small_config(tmp_path / "run", changes.get("mode", "den"))
    data = DataConfig(tasks=("digits", "high"), batch_size=10, joint=True)
    config = dataclasses.replace(config, data=data, network=NetworkConfig("wrn8_1", trunk_size=8), progress=True)
    train(config)
    run = open_run(config.out)
    assert run.model.config.joint == (config.mode != "nestednet")
    assert cli.main(["evaluate", str(config.out)]) == 0
    told = capsys.readouterr()
    if config.mode == "den":
        assert read_metrics(config.out)[-1]["equal_structures"] == 1
        assert "digits, high: one structure for all labels of 100.0 % of the images" in told.out


def test_settings_of_before_have_tasks_apart():
    assert not TrainConfig(data=DataConfig(tasks=("digits", "fashion"))).joint
    assert scenario_config("m3").joint
