"""Options that the paper does not have: distillation, the selector's auxiliary loss, more samples late."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from den.data import Batch
from den.nn.model import create_model
from den.nn.tasks import Task
from den.recipes import den as recipe
from den.recipes.auxiliary import CostHead, cost_loss
from den.recipes.base import Method, logits_and_features
from den.recipes.den import train
from den.recipes.distillation import distilled_losses, taught_images, taught_loss, with_teachers
from den.runs.trained import open_run
from den.train.config import DataConfig, EstimatorTraining, TrainConfig
from den.train.folder import read_metrics
from tests.small_runs import cut_sets, few_images, small_config, train_interrupted

TASKS = [Task("a", 3, 8, 1), Task("b", 4, 12)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def model_and_batch(sizes=(5, 4)):
    torch.manual_seed(0)
    model = create_model("wrn8_1", TASKS, trunk_size=8).eval()
    images = [torch.randn(n, t.channels, t.size, t.size) for t, n in zip(TASKS, sizes, strict=True)]
    labels = [torch.randint(t.classes, (n,)) for t, n in zip(TASKS, sizes, strict=True)]
    return model, Batch(tuple(t.name for t in TASKS), images, labels)


def test_a_distilled_loss_by_hand():
    """Two images, the second of which is taught at temperature 2 and weight 0.75."""
    own, full = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    labels, taught = torch.tensor([0, 1]), torch.tensor([1])
    found = distilled_losses(torch.cat([own, full]), labels, taught, 0.75, 2.0)
    target, answer = (full / 2).softmax(1)[0], (own[1] / 2).softmax(0)
    divergence = (target * (target / answer).log()).sum()
    expected = 0.25 * -own[1].log_softmax(0)[1] + 0.75 * 4 * divergence - full[0].log_softmax(0)[1]
    torch.testing.assert_close(found, torch.stack([-own[0].log_softmax(0)[0], expected]))


def test_the_full_structure_learns_nothing_of_its_pupils():
    logits = torch.randn(7, 3, generator=generator(), requires_grad=True)
    labels, taught = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 2, 3])
    distilled_losses(logits, labels, taught, 1.0, 2.0).sum().backward()
    full = logits.detach()[4:].requires_grad_()
    F.cross_entropy(full, labels[taught], reduction="sum").backward()
    torch.testing.assert_close(logits.grad[4:], full.grad)


@given(st.integers(0, 99), st.floats(0.01, 1))
def test_taught_images_run_at_both_structures(seed, share):
    model, batch = model_and_batch()
    structures = torch.randint(model.levels, (len(batch), model.num_blocks), generator=generator(seed))
    taught = taught_images(batch, share, generator(seed))
    more, rows = with_teachers(batch, structures, taught, model.levels - 1)
    with torch.no_grad():
        found = model.estimator(more.images, more.tasks, rows)
        own, full = (model.estimator(batch.images, batch.tasks, z) for z in (structures, None))
    for k, index in enumerate(taught):
        torch.testing.assert_close(found[k], torch.cat([own[k], full[k][index]]), rtol=1e-4, atol=1e-5)
        assert torch.equal(more.labels[k], torch.cat([batch.labels[k], batch.labels[k][index]]))


def test_the_share_of_taught_images_is_the_one_asked_for():
    batch = Batch(("a", "b"), [torch.zeros(1500, 1, 1, 1)] * 2, [torch.zeros(1500)] * 2)
    batch = dataclasses.replace(batch, images=[torch.zeros(1500, 1, 1, 1), torch.zeros(1500, 1, 1, 1)])
    assert [len(index) / 1500 for index in taught_images(batch, 0.3, generator())] == pytest.approx([0.3] * 2, abs=0.05)


def run_config(out, **options):
    config = small_config(out, "den")
    estimator = {name: options[name] for name in options if name.startswith(("distill", "teacher"))}
    selector = {name: options[name] for name in options if name not in estimator}
    return dataclasses.replace(
        config,
        estimator=dataclasses.replace(config.estimator, **estimator),
        selector=dataclasses.replace(config.selector, **selector),
    )


@pytest.mark.parametrize("options", [{"distill": 0.5, "distill_share": 0.5}, {"auxiliary": 1.0, "late_samples": 6}])
def test_a_run_with_an_option_goes_on_where_it_stopped_and_is_opened(tmp_path, monkeypatch, options):
    cut_sets(monkeypatch)
    whole, parts = (run_config(tmp_path / name, **options) for name in ("whole", "parts"))
    expected = train(whole).state_dict()
    train_interrupted(parts, monkeypatch, at=13)
    found = train(parts, resume=True).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert read_metrics(whole.out)[-1]["train"]["loss"] > 0
    opened = open_run(whole.out).model.state_dict()
    assert all(torch.equal(opened[name], expected[name]) for name in expected)
    assert any(name.startswith("method.costs") for name in expected) == ("auxiliary" in options)


def trained_teacher(folder, seed=3):
    """Folder of a dense run for the tasks of `run_config`."""
    train(small_config(folder, "dense", seed=seed))
    return folder


@pytest.mark.parametrize("mode", ["den", "dense"])
def test_a_teacher_teaches_does_not_learn_and_is_found_again(tmp_path, monkeypatch, mode):
    cut_sets(monkeypatch)
    teacher = trained_teacher(tmp_path / "teacher")
    before = (teacher / "last.safetensors").read_bytes()
    options = {"teacher": teacher, "distill": 0.9, "distill_temperature": 4.0}
    whole, parts = (
        dataclasses.replace(run_config(tmp_path / name, **options), mode=mode) for name in ("whole", "parts")
    )
    expected = train(whole).state_dict()
    train_interrupted(parts, monkeypatch, at=3)
    assert all(torch.equal(found, expected[name]) for name, found in train(parts, resume=True).state_dict().items())
    assert not any("teacher" in name for name in expected)
    assert (teacher / "last.safetensors").read_bytes() == before
    alone = train(dataclasses.replace(run_config(tmp_path / "alone"), mode=mode)).state_dict()
    assert not all(torch.equal(alone[name], expected[name]) for name in expected)


def test_a_taught_loss_by_hand():
    """The mean of 0.25 times the loss of the label and 0.75 times 4 times the divergence at temperature 2."""
    model, batch = model_and_batch()
    teacher = create_model("wrn8_1", TASKS, trunk_size=8).eval()
    structures = torch.randint(model.levels, (len(batch), model.num_blocks), generator=generator())
    estimator = EstimatorTraining(distill=0.75, distill_temperature=2.0)
    method = Method(model, TrainConfig(data=DataConfig(tasks=("a", "b")), estimator=estimator))
    objective = taught_loss(method, teacher, batch, structures)
    objective.loss.backward()
    assert all(weight.grad is None for weight in teacher.parameters())
    own = model.estimator(batch.images, batch.tasks, structures)
    theirs = teacher.estimator(batch.images, batch.tasks, None)
    losses = []
    for logits, target, labels in zip(own, theirs, batch.labels, strict=True):
        target, answer = (target / 2).softmax(1), (logits / 2).softmax(1)
        divergence = (target * (target / answer).log()).sum(1)
        losses.append(0.25 * F.cross_entropy(logits, labels, reduction="none") + 0.75 * 4 * divergence)
    torch.testing.assert_close(objective.loss, torch.cat(losses).mean())
    assert objective.measured["flops_ratio"] == method.flops_ratio(structures, batch)


def test_a_teacher_of_other_tasks_or_images_is_refused(tmp_path, monkeypatch):
    cut_sets(monkeypatch)
    teacher = trained_teacher(tmp_path / "teacher")
    config = run_config(tmp_path / "run", teacher=teacher, distill=0.5)
    with pytest.raises(ValueError, match=r"estimator.teacher must be a run of .*digits.*, got .*teacher of"):
        train(dataclasses.replace(config, data=DataConfig(tasks=("digits",), batch_size=10)))
    plain = few_images("digits", "train", 60)
    other = dataclasses.replace(plain, mean=(0.25,))
    monkeypatch.setattr(
        "den.recipes.setup.load_set", lambda name, split, _: other if name == "digits" else few_images(name, split, 60)
    )
    with pytest.raises(ValueError, match=r"must have learnt from digits of mean \(0.25,\), got"):
        train(config)


def test_labels_of_the_same_images_are_distilled_together(tmp_path, monkeypatch):
    cut_sets(monkeypatch)
    batches = []
    plain = recipe.distilled_loss
    monkeypatch.setattr(recipe, "distilled_loss", lambda *given: batches.append(given[1]) or plain(*given))
    sets = {"coarse": 5, "fine": 10}
    monkeypatch.setattr("den.recipes.setup.load_set", lambda name, split, root: labelled(name, split, sets[name]))
    config = run_config(tmp_path / "run", distill=1.0, distill_share=0.5)
    data = DataConfig(tasks=("coarse", "fine"), batch_size=10, joint=True)
    train(dataclasses.replace(config, data=data))
    assert batches
    assert all(batch.joint for batch in batches)


def labelled(name, split, classes):
    images = few_images("digits", split, 60)
    return dataclasses.replace(
        images, name=name, labels=images.labels % classes, classes=classes, class_names=(), source="the same"
    )


def test_a_head_of_costs_by_hand_and_in_training():
    head = CostHead(2, 2, 3)
    structures = torch.tensor([[[0, 2], [1, 1]]])
    assert head(torch.ones(1, 2), structures).tolist() == [[0, 0]]
    with torch.no_grad():
        head.costs.bias.copy_(torch.arange(7.0))  # 0 of the image; 1, 2, 3 and 4, 5, 6 of the blocks' levels
        head.costs.weight[0] = torch.tensor([10.0, 1.0])
    assert head(torch.tensor([[1.0, 2.0]]), structures).tolist() == [[12 + 1 + 6, 12 + 2 + 5]]
    features, structures = torch.randn(64, 2, generator=generator()), torch.randint(3, (64, 4, 2))
    costs = features[:, :1] + 0.3 * structures.sum(-1)
    head, optimiser = (made := CostHead(2, 2, 3)), torch.optim.Adam(made.parameters(), 0.05)
    losses = []
    for _ in range(200):
        loss = cost_loss(head(features, structures), costs).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


def test_the_features_are_what_the_heads_read():
    model, batch = model_and_batch()
    logits, features = logits_and_features(model, batch)
    assert torch.equal(logits, model.selector_logits(batch.images, batch.tasks))
    parts = zip(model.selector.heads, features.split([5, 4]), strict=True)
    torch.testing.assert_close(torch.cat([head(part) for head, part in parts]), logits.flatten(1))


@pytest.mark.parametrize(("before", "after"), [(0.0, 1.0), (1.0, 0.0), (1.0, 1.0)])
def test_a_run_starts_from_one_with_another_head_of_costs(tmp_path, monkeypatch, before, after):
    cut_sets(monkeypatch)
    first = train(run_config(tmp_path / "first", auxiliary=before)).state_dict()
    config = run_config(tmp_path / "second", auxiliary=after)
    second = train(dataclasses.replace(config, start=tmp_path / "first", selector_only=True)).state_dict()
    assert any(name.startswith("method.costs") for name in second) == (after > 0)
    assert all(torch.equal(first[name], second[name]) for name in first if name.startswith("estimator"))


def test_late_samples_come_in_the_second_half(tmp_path, monkeypatch):
    cut_sets(monkeypatch)
    asked = []
    plain = recipe.sample_structures
    monkeypatch.setattr(recipe, "sample_structures", lambda *given: asked.append(given[1]) or plain(*given))
    train(run_config(tmp_path / "run", samples=3, late_samples=5))
    assert asked == [3] * 6 + [5] * 6


def test_an_option_that_is_off_changes_nothing(tmp_path, monkeypatch):
    cut_sets(monkeypatch)
    one = train(run_config(tmp_path / "one")).state_dict()
    other = train(run_config(tmp_path / "other", distill_share=0.9, late_samples=4)).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
