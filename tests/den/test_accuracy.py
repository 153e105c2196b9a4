"""Accuracy, costs and times of a network on an image set, and the best single structure of a cost."""

import json

import pytest
import torch

from den.data import load_set
from den.evaluate.accuracy import best_static, evaluate, full_flops, static_candidates
from den.evaluate.timing import time_per_image
from den.nn.model import create_model


def test_evaluation_counts_by_hand():
    model = create_model("wrn8_1", [load_set("digits", "test").task], trunk_size=8)
    image_set = load_set("digits", "test").subset(torch.arange(37))
    training = [module.training for module in model.modules()]
    report = evaluate(model, [image_set], torch.tensor([1, 0, 3]), batch_size=10)["digits"]
    assert [module.training for module in model.modules()] == training
    model.eval()
    with torch.no_grad():
        logits = model.estimator(image_set.inputs(), "digits", torch.tensor([[1, 0, 3]]).expand(37, 3))
    assert report.accuracy == pytest.approx((logits.argmax(1) == image_set.labels).double().mean().item())
    assert report.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, image_set.labels).item(), rel=1e-4)
    assert report.flops == model.estimator.level_flops[0, 1] + model.estimator.level_flops[2, 3]
    assert report.flops_ratio == report.flops / full_flops(model)
    assert report.penalty == pytest.approx(((0.25 + 0 + 1) / 3) ** 2)
    assert report.structures == 1
    assert report.histogram.tolist() == [[0, 37, 0, 0], [37, 0, 0, 0], [0, 0, 0, 37]]
    assert report.common[0].tolist() == [[1, 0, 3]]
    assert report.common[1].tolist() == [37]
    json.dumps(report.summary())


def test_selected_structures_are_evaluated_as_the_model_runs_them():
    model = create_model("wrn14_1", [load_set("digits", "test").task], trunk_size=8)
    for head in model.selector.heads:
        torch.nn.init.normal_(head.weight, std=1.0)
    model.eval()
    image_set = load_set("digits", "test").subset(torch.arange(50))
    report = evaluate(model, [image_set])["digits"]
    with torch.no_grad():
        logits, levels = model(image_set.inputs(), "digits", return_levels=True)
    assert torch.equal(report.levels, levels)
    assert report.structures == len({tuple(row) for row in levels.tolist()}) > 1
    assert report.accuracy == pytest.approx((logits.argmax(1) == image_set.labels).double().mean().item())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_static_candidates_keep_to_the_budget(share):
    model = create_model("wrn14_1", [load_set("digits", "test").task], trunk_size=8)
    budget = share * full_flops(model)
    found = static_candidates(model, budget, 20, 0.03, seed=0)
    costs = model.estimator.level_flops.gather(1, found.t()).sum(0)
    assert len(found) == len(found.unique(dim=0)) == (20 if 0 < share < 1 else 1)
    assert ((costs - budget).abs() <= 0.03 * budget).all()


def test_best_static_structure_is_the_best_of_those_tried():
    model = create_model("wrn8_1", [load_set("digits", "test").task], trunk_size=8).eval()
    image_set = load_set("digits", "test").subset(torch.arange(80))
    budget, extra = 0.5 * full_flops(model), torch.tensor([[0, 0, 0], [3, 3, 3]])
    found = best_static(model, image_set, budget, extra=extra, candidates=8, tolerance=0.2)
    tried = torch.cat([static_candidates(model, budget, 8, 0.2, seed=0), extra[:1]]).unique(dim=0)
    accuracies = [evaluate(model, [image_set], structure)["digits"].accuracy for structure in tried]
    assert found.candidates == len(tried)
    assert found.report.accuracy == max(accuracies)
    assert found.report.flops <= 1.2 * budget


def test_timing_is_per_image_of_every_way():
    model = create_model("wrn8_1", [load_set("digits", "test").task], trunk_size=8)
    timing = time_per_image(model, load_set("digits", "test"), batch_size=16, rounds=3)
    seconds = (timing.plain, timing.full, timing.selected, timing.selector)
    assert all(0 < s < 10 for s in seconds)  # speed itself is a matter of benchmarks
    assert 0 < timing.flops_ratio <= 1
    assert timing.speedup == min(timing.plain, timing.full) / timing.selected
    assert timing.realised == timing.speedup * timing.flops_ratio
