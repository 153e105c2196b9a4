"""Equations 3, 5, 6, 7 and 8, each against what it says."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from den.data import Batch
from den.nn.count import parameter_fractions
from den.nn.estimator import repeated
from den.nn.model import create_model
from den.nn.tasks import Task
from den.train.objective import (
    STEERING,
    RunningBaseline,
    draw_levels,
    entropy,
    initial_structures,
    instance_losses,
    leave_one_out_advantage,
    reinforce,
    sample_structures,
    selected_structures,
    sparsity_penalty,
    steered_rho,
    structure_costs,
    structure_log_probability,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_log_probabilities(*shape, seed=0, scale=1.0):
    return (scale * torch.randn(*shape, generator=generator(seed))).log_softmax(-1)


@pytest.mark.parametrize("tau", [0.0, 0.75, 1.0])
def test_initial_distribution_gives_every_structure_its_probability(tau):
    """Equation 8: (1 - tau) / h^n each, and tau more for the full structure; within 5 standard deviations."""
    count, blocks, levels = 40000, 2, 3
    drawn = initial_structures(count, blocks, levels, tau, generator())
    codes = (drawn[:, 0] * levels + drawn[:, 1]).bincount(minlength=levels**blocks) / count
    expected = torch.full((levels**blocks,), (1 - tau) / levels**blocks)
    expected[-1] += tau
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((codes - expected).abs() <= 5 * deviation + 1e-9).all()


def test_sampled_structures_follow_the_selector():
    log_probabilities = random_log_probabilities(1, 2, 3)
    drawn = sample_structures(log_probabilities, 40000, 0.0, generator())
    assert drawn.shape == (1, 40000, 2)
    for block in range(2):
        share = drawn[0, :, block].bincount(minlength=3) / 40000
        assert torch.allclose(share, log_probabilities[0, block].exp(), atol=0.015)


def test_samples_of_an_image_come_from_its_own_distribution():
    certain = torch.full((3, 2, 4), -1e9)
    levels = torch.tensor([[0, 3], [2, 1], [1, 1]])
    certain.scatter_(2, levels[..., None], 0.0)
    assert torch.equal(sample_structures(certain, 5, 0.0, generator()), levels[:, None].expand(3, 5, 2))


def test_exploration_replaces_the_given_share_of_samples():
    certain = torch.full((1, 8, 4), -1e9)
    certain[..., 3] = 0.0
    drawn = sample_structures(certain, 20000, 0.25, generator())
    untouched = (drawn == 3).all(-1).float().mean().item()
    assert untouched == pytest.approx(0.75, abs=0.015)


def test_selected_structures_are_the_likeliest_or_drawn():
    logits = torch.randn(50, 3, 4, generator=generator())
    assert torch.equal(selected_structures(logits, None), logits.argmax(-1))
    assert not torch.equal(selected_structures(logits, generator()), logits.argmax(-1))


def test_log_probability_is_the_sum_over_blocks_and_does_not_underflow():
    log_probabilities = random_log_probabilities(2, 60, 4, scale=30.0)
    structures = torch.randint(4, (2, 3, 60), generator=generator())
    expected = torch.zeros(2, 3)
    for b, s, n in itertools.product(range(2), range(3), range(60)):
        expected[b, s] += log_probabilities[b, n, structures[b, s, n]]
    found = structure_log_probability(log_probabilities, structures)
    assert torch.allclose(found, expected, rtol=1e-5)
    assert found.max() < -200  # the product of the probabilities is 0 in float32


def test_probabilities_of_all_structures_add_up_to_one():
    log_probabilities = random_log_probabilities(1, 3, 4)
    everything = torch.tensor(list(itertools.product(range(4), repeat=3)))[None]
    assert structure_log_probability(log_probabilities, everything).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_penalty_squares_the_mean_share_of_every_instance_alone():
    fractions = torch.tensor([[0.0, 0.25, 1.0], [0.0, 0.5, 1.0]])
    structures = torch.tensor([[0, 0], [1, 1], [2, 2], [2, 0]])
    expected = torch.tensor([0.0, ((0.25 + 0.5) / 2) ** 2, 1.0, 0.25])
    assert torch.allclose(sparsity_penalty(structures, fractions, 0.3), 0.3 * expected)
    assert sparsity_penalty(structures.view(2, 2, 2), fractions, 0.3).shape == (2, 2)


def test_penalty_of_a_real_network_is_rho_at_full_structure_and_0_at_none():
    model = create_model("wrn8_1", [Task("a", 3, 8)], trunk_size=8)
    structures = torch.tensor([[3] * 3, [0] * 3, [2] * 3])
    assert sparsity_penalty(structures, parameter_fractions(model), 0.7).tolist() == pytest.approx([0.7, 0.0, 0.175])


def test_penalty_takes_a_rho_for_every_image():
    structures = torch.tensor([[[2, 2], [1, 0]], [[2, 0], [1, 1]]])  # [B, S, N]
    fractions = torch.tensor([[0.0, 0.5, 1.0]] * 2)
    found = sparsity_penalty(structures, fractions, torch.tensor([[0.5], [2.0]]))
    expected = [sparsity_penalty(part, fractions, rho) for part, rho in zip(structures, (0.5, 2.0), strict=True)]
    assert torch.equal(found, torch.stack(expected))


def test_steered_rho_rises_steeply_with_the_cost_between_bounds():
    costs = torch.tensor([0.0, 0.36, 0.38, 0.4, 0.42, 0.44, 1.0], dtype=torch.float64)
    root = STEERING**0.5
    assert steered_rho(0.1, costs, 0.4).tolist() == pytest.approx(
        [0.1 / root**2, 0.1 / root**2, 0.1 / root, 0.1, 0.1 * root, 3.2, 3.2]
    )


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(2, 6), st.integers(1, 5), st.floats(0, 8))
def test_drawn_levels_are_those_of_multinomial(seed, rows, levels, samples, scale):
    """To the bit, and the generator stands where it would."""
    chances = random_log_probabilities(rows, levels, seed=seed, scale=scale).exp()
    ours, theirs = generator(seed), generator(seed)
    expected = torch.multinomial(chances, samples, replacement=True, generator=theirs)
    assert torch.equal(draw_levels(chances, samples, ours), expected)
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_entropy_of_known_distributions():
    distributions = torch.tensor([[0.25] * 4, [0.5, 0.5, 1e-30, 1e-30]])
    assert entropy(distributions.log()).tolist() == pytest.approx([math.log(4), math.log(2)])


def test_leave_one_out_advantage_compares_with_the_other_samples_of_the_image():
    costs = torch.rand(5, 4, generator=generator())
    found = leave_one_out_advantage(costs)
    for b, s in itertools.product(range(5), range(4)):
        others = [costs[b, o].item() for o in range(4) if o != s]
        assert found[b, s].item() == pytest.approx(costs[b, s].item() - sum(others) / 3, abs=1e-6)


def test_leave_one_out_needs_two_samples():
    with pytest.raises(ValueError, match="at least 2 samples per image, got 1"):
        leave_one_out_advantage(torch.zeros(3, 1))


def test_running_baseline_is_kept_per_task():
    batch = Batch(("a", "b"), [torch.zeros(2, 1), torch.zeros(1, 1)], [torch.zeros(2), torch.zeros(1)])
    baseline = RunningBaseline(("a", "b"), momentum=0.75)
    first = baseline.advantage(torch.tensor([[1.0], [3.0], [10.0]]), batch)
    assert first.flatten().tolist() == [-1.0, 1.0, 0.0]  # the first batch is its own baseline
    second = baseline.advantage(torch.tensor([[4.0], [4.0], [0.0]]), batch)
    assert second.flatten().tolist() == [2.0, 2.0, -10.0]
    assert baseline.means == {"a": 0.75 * 2 + 0.25 * 4, "b": 0.75 * 10 + 0.25 * 0}


@pytest.mark.parametrize("baseline", ["leave-one-out", "none"])
def test_mean_reinforce_gradient_is_the_gradient_of_the_expected_cost(baseline):
    """Equation 7 against the exact gradient of sum_z P(z) R(z), for every structure of 2 blocks of 3 levels."""
    logits = torch.randn(1, 2, 3, generator=generator(1), dtype=torch.float64, requires_grad=True)
    everything = torch.tensor(list(itertools.product(range(3), repeat=2)))[None]
    cost_table = torch.rand(3, 3, generator=generator(2), dtype=torch.float64)
    exact = (structure_log_probability(logits.log_softmax(-1), everything).exp() * cost_table.flatten()).sum()
    (expected,) = torch.autograd.grad(exact, logits)

    log_probabilities = logits.log_softmax(-1).expand(200000, -1, -1)
    structures = sample_structures(log_probabilities, 2, 0.0, generator(3))
    costs = cost_table[structures[..., 0], structures[..., 1]]
    advantage = leave_one_out_advantage(costs) if baseline == "leave-one-out" else costs
    (found,) = torch.autograd.grad(reinforce(log_probabilities, structures, advantage, 0.0), logits)
    assert (found - expected).abs().max() < 0.003
    assert expected.abs().max() > 0.03


def test_entropy_bonus_pushes_towards_the_uniform_distribution():
    logits = torch.tensor([[[2.0, 0.0, 0.0]]], requires_grad=True)
    structures = torch.zeros(1, 2, 1, dtype=torch.int64)
    reinforce(logits.log_softmax(-1), structures, torch.zeros(1, 2), 0.1).backward()
    assert logits.grad[0, 0, 0] > 0  # descent lowers the likeliest level
    assert (logits.grad[0, 0, 1:] < 0).all()


def test_costs_of_samples_are_those_of_single_runs():
    """Equation 6, sample by sample and image by image."""
    torch.manual_seed(0)
    model = create_model("wrn8_1", [Task("a", 3, 8, 1), Task("b", 4, 12)], trunk_size=8).eval()
    images = [torch.randn(3, 1, 8, 8), torch.randn(2, 3, 12, 12)]
    labels = [torch.tensor([0, 2, 1]), torch.tensor([3, 0])]
    structures = torch.randint(4, (5, 4, 3), generator=generator())
    found = structure_costs(model, Batch(("a", "b"), images, labels), structures, 0.5)
    assert found.shape == (5, 4)
    assert not found.requires_grad
    instances = [(images[0][i : i + 1], "a", labels[0][i : i + 1]) for i in range(3)]
    instances += [(images[1][i : i + 1], "b", labels[1][i : i + 1]) for i in range(2)]
    for b, s in itertools.product(range(5), range(4)):
        image, task, label = instances[b]
        with torch.no_grad():
            logits = model.estimator(image, task, structures[b, s][None])
        loss = torch.nn.functional.cross_entropy(logits, label)
        expected = loss + sparsity_penalty(structures[b, s], parameter_fractions(model), 0.5)
        assert found[b, s].item() == pytest.approx(expected.item(), rel=1e-4)


def test_instance_losses_keep_the_order_of_the_batch():
    logits = [torch.randn(2, 3, generator=generator()), torch.randn(1, 5, generator=generator(1))]
    labels = [torch.tensor([0, 2]), torch.tensor([4])]
    found = instance_losses(logits, labels)
    expected = [-logits[0].log_softmax(1)[0, 0], -logits[0].log_softmax(1)[1, 2], -logits[1].log_softmax(1)[0, 4]]
    assert found.tolist() == pytest.approx([value.item() for value in expected])


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_repeated_maps_keep_their_memory_format(memory_format):
    maps = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory_format)
    found = repeated(maps, 2)
    assert torch.equal(found, torch.stack([maps, maps], 1).flatten(0, 1))
    assert found.is_contiguous(memory_format=memory_format)
