"""Operating points: a cost on the selector's logits at run time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from den import create_model
from den.data import load_set
from den.evaluate.operating import (
    LevelCosts,
    at_flops,
    at_milliseconds,
    choose_weight,
    chosen_levels,
    flops_costs,
    measured_costs,
    selector_logits,
    steered,
)
from den.nn.count import count_flops


@pytest.fixture(scope="module")
def network():
    """An untrained network whose selector tells images apart, and digits."""
    images = load_set("digits", "train").subset(torch.arange(300))
    torch.manual_seed(0)
    model = create_model("wrn14_1", [images.task], trunk_size=8).eval()
    torch.nn.init.normal_(model.selector.heads[0].weight)
    return model, images


def test_costs_are_the_flops_of_a_structure_over_the_full_ones(network):
    model, _ = network
    costs = flops_costs(model)
    structures = torch.randint(4, (10, 6))
    full = count_flops(model, torch.full((1, 6), 3))
    torch.testing.assert_close(costs.of(structures), count_flops(model, structures) / full)
    assert (costs.least, costs.most) == (0, pytest.approx(1))


@given(st.integers(0, 10**6), st.floats(-30, 30), st.floats(0, 30))
def test_cost_never_rises_with_lambda_whatever_the_costs_are(seed, weight, more):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, 3, 4, generator=generator)
    costs = LevelCosts(torch.rand(3, 4, generator=generator, dtype=torch.float64), fixed=0.1)
    first, second = (costs.of(chosen_levels(logits, costs, w)) for w in (weight, weight + more))
    assert (second <= first + 1e-12).all()


@given(st.integers(0, 10**6), st.floats(0.05, 0.95))
def test_lambda_is_the_smallest_within_the_limit(seed, limit):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(400, 3, 4, generator=generator)
    costs = LevelCosts(torch.tensor([[0, 0.25, 0.5, 1]] * 3, dtype=torch.float64) / 3)
    weight = choose_weight(logits, costs, limit)
    assert limit - 0.01 < costs.of(chosen_levels(logits, costs, weight)).mean() <= limit + 1e-9
    assert costs.of(chosen_levels(logits, costs, weight - 1e-6)).mean() > limit


def test_images_that_are_all_alike_keep_to_the_limit_as_well():
    logits = torch.tensor([[[0.0, 1.5, 0.1, 2.0]]]).expand(50, 2, 4)
    costs = LevelCosts(torch.tensor([[0, 0.25, 0.5, 1]] * 2, dtype=torch.float64) / 2)
    weight = choose_weight(logits, costs, 0.6)
    assert costs.of(chosen_levels(logits, costs, weight)).mean() == 0.25
    assert costs.of(chosen_levels(logits, costs, choose_weight(logits, costs, 1.0))).mean() == 1
    assert costs.of(chosen_levels(logits, costs, choose_weight(logits, costs, 0.0))).mean() == 0


@pytest.mark.parametrize("limit", [0.2, 0.5, 0.8])
def test_budget_holds_on_images_that_it_was_not_chosen_on(network, limit):
    model, images = network
    before = model.selector.heads[0].bias.clone()
    point, weights = at_flops(model, [images], limit)
    assert torch.equal(model.selector.heads[0].bias, before)
    test = load_set("digits", "test")
    full = count_flops(model, torch.full((1, 6), 3))
    ratio = count_flops(point, point.select(test.inputs(), "digits")).mean() / full
    assert ratio.item() == pytest.approx(limit, abs=0.04)
    expected = chosen_levels(selector_logits(model, test), flops_costs(model), weights["digits"])
    agree = (point.select(test.inputs(), "digits") == expected).double().mean()
    assert agree > 0.999  # equal but for rounding to float32
    assert at_flops(model, [images], limit + 0.1)[1]["digits"] < weights["digits"]


def test_only_the_tasks_that_are_steered_change():
    sets = [load_set(name, "test").subset(torch.arange(30)) for name in ("digits", "fashion")]
    model = create_model("wrn8_1", [s.task for s in sets], trunk_size=8).eval()
    point = steered(model, {"digits": flops_costs(model)}, {"digits": 50.0})
    assert point.select(sets[0].inputs(), "digits").sum() == 0
    assert torch.equal(
        point.selector_logits(sets[1].inputs(), "fashion"), model.selector_logits(sets[1].inputs(), "fashion")
    )


def test_a_time_is_met_through_measured_costs_and_corrected(network):
    """The clock runs 1.5 times as fast as the linear model says, which only the correction can find out."""
    model, images = network
    costs = LevelCosts(flops_costs(model).levels * 4, fixed=1.0)

    def clock(candidate, image_set):
        return costs.of(candidate.select(image_set.inputs(), "digits")).mean().item() / 1.5

    point, _ = at_milliseconds(model, [images], 2.0, measure=lambda *_: costs, clock=clock)
    assert clock(point, images) == pytest.approx(2.0, rel=0.021)
    whole, _ = at_milliseconds(model, [images], 50.0, measure=lambda *_: costs, clock=clock)
    assert (whole.select(images.inputs(), "digits") == 3).all()
    with pytest.raises(ValueError, match=r"limit must be at least 1, the cheapest structure's, got 0\.9"):
        at_milliseconds(model, [images], 0.9, measure=lambda *_: costs, clock=clock)


def test_measured_costs_have_a_number_for_every_block_and_level(network):
    model, images = network
    costs = measured_costs(model, images, batch_size=16, rounds=2)
    assert costs.levels.shape == (6, 4)
    assert (costs.levels[:, 1:] > 0).all()
    skipped = [bool(cost == 0) for cost in costs.levels[:, 0]]  # the identity is not called for nobody
    assert skipped == [block.shortcut.is_identity for block in model.estimator.blocks]
    assert costs.fixed >= 0
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.estimator.blocks)
