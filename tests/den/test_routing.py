"""Routing: updates of its policy against hand computations, and the table that each task keeps."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from den.data import Batch
from den.recipes import method_of
from den.recipes.routing import learn_policy, project_to_simplex
from tests.small_methods import Bench, generator, model_and_batch
from tests.small_runs import small_config


def test_routing_update_by_hand():
    """One image, two agents of three levels: right with R = 1, then wrong with R = -1."""
    policy, value = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]), torch.tensor([0.2, -0.4])
    levels = torch.tensor([[1, 2]])
    found = learn_policy(policy, value, levels, torch.tensor([1.0]), rate=0.1)
    gains = 0.8 * 0.7 * 0.1, 1.4 * 0.4 * 0.1  # (R - V) (1 - policy(a)) rate; the surplus leaves all levels alike
    expected = [
        [0.5 - gains[0] / 3, 0.3 + gains[0] * 2 / 3, 0.2 - gains[0] / 3],
        [0.2 - gains[1] / 3, 0.2 - gains[1] / 3, 0.6 + gains[1] * 2 / 3],
    ]
    torch.testing.assert_close(found, torch.tensor(expected))
    found = learn_policy(policy, value, levels, torch.tensor([-1.0]), rate=0.1)
    losses = 1.2 * 0.3 * 0.1, 0.6 * 0.6 * 0.1  # (R - V) policy(a) rate
    expected = [
        [0.5 + losses[0] / 3, 0.3 - losses[0] * 2 / 3, 0.2 + losses[0] / 3],
        [0.2 + losses[1] / 3, 0.2 + losses[1] / 3, 0.6 - losses[1] * 2 / 3],
    ]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_routing_update_of_a_batch_is_the_mean_of_its_images():
    policy = torch.rand(4, 3, generator=generator()).softmax(-1)
    value, returns = torch.rand(4, generator=generator(1)), torch.randn(5, generator=generator(2))
    levels = torch.randint(3, (5, 4), generator=generator(3))
    step = torch.zeros(4, 3)
    for b, n in itertools.product(range(5), range(4)):
        gain, chance = returns[b] - value[n], policy[n, levels[b, n]]
        step[n, levels[b, n]] += gain * (1 - chance if gain >= 0 else chance) / 5
    expected = project_to_simplex(policy + 0.3 * step)
    torch.testing.assert_close(learn_policy(policy, value, levels, returns, 0.3), expected)


def test_routing_finds_the_level_that_answers_right():
    policy, value, draws = torch.full((2, 3), 1 / 3), torch.zeros(2), generator()
    for _ in range(300):
        levels = torch.multinomial(policy.repeat(16, 1), 1, generator=draws).view(16, 2)
        returns = (levels[:, 0] == 1).float() * 2 - 1
        policy = learn_policy(policy, value, levels, returns, 0.1)
        value = value + 0.05 * (returns.mean() - value)
    assert policy[0, 1] > 0.9
    assert policy.sum(1).tolist() == pytest.approx([1, 1], abs=1e-5)


def test_routing_keeps_tables_of_each_task(tmp_path):
    model, batch = model_and_batch()
    method = method_of(model, small_config(tmp_path, "routing"))
    method.state.policy[0, :, 1] = 1.0  # task a nearly always at level 1
    method.state.policy[0] /= method.state.policy[0].sum(-1, keepdim=True)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    method.objective(Bench(), method.phases()[0], Batch(batch.tasks[:1], batch.images[:1], batch.labels[:1]))
    assert not torch.equal(method.state.policy[0], before["policy"][0])
    assert torch.equal(method.state.policy[1], before["policy"][1])
    assert torch.equal(method.state.value[1], before["value"][1])
    assert method.structures(batch.images[0], "a").tolist() == [[1, 1, 1]] * 3


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=6))
def test_simplex_projection_is_the_nearest_distribution(values):
    """Against bisection for the number that is taken off all entries."""
    x = torch.tensor(values, dtype=torch.float64)
    low, high = x.min() - 1, x.max()
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (x - middle).clamp_min(0).sum() > 1 else (low, middle)
    found = project_to_simplex(x)
    torch.testing.assert_close(found, (x - high).clamp_min(0), atol=1e-9, rtol=0)
    assert found.sum().item() == pytest.approx(1)
