"""BlockDrop: rewards, chances, curriculum and losses against hand computations."""

import math

import pytest
import torch

from den.recipes import method_of
from den.recipes.blockdrop import draw, free_blocks, policy_loss, rewards
from tests.small_methods import TASKS, Bench, generator, model_and_batch
from tests.small_runs import small_config


def test_blockdrop_reward_by_hand():
    keeps = torch.tensor([[True, True, False, False], [True, True, True, True], [False] * 4, [False] * 4])
    found = rewards(keeps, torch.tensor([1.0, 1.0, 1.0, 0.0]), gamma=5.0)
    assert found.tolist() == [1 - 0.25, 0.0, 1.0, -5.0]


def test_blockdrop_draws_from_bounded_chances():
    logits = torch.tensor([[-50.0, 50.0, 0.0]]).expand(20000, 3)
    drawn, greedy, chance = draw(logits, 3, 0.8, generator())
    assert chance[0].tolist() == pytest.approx([0.2, 0.8, 0.5])
    assert drawn.float().mean(0).tolist() == pytest.approx([0.2, 0.8, 0.5], abs=0.015)
    assert greedy[0].tolist() == [False, True, True]
    drawn, greedy, _ = draw(logits, 1, 0.8, generator())
    assert drawn[:, :2].all()
    assert greedy[:, :2].all()
    assert not drawn[:, 2].all()


def test_blockdrop_curriculum_frees_the_last_blocks_first():
    found = [free_blocks(15, step / 100, 0.5) for step in range(101)]
    assert found == sorted(found)
    assert (found[0], found[25], found[50], found[100]) == (1, 8, 15, 15)
    assert free_blocks(15, 0.0, 0.0) == 15


def test_blockdrop_policy_loss_by_hand():
    chance, keeps = torch.tensor([[0.9, 0.8, 0.3], [0.5, 0.5, 0.5]]), torch.tensor([[True, True, False], [False] * 3])
    advantage = torch.tensor([2.0, -1.0])
    likelihood = [math.log(0.8) + math.log(0.7), 2 * math.log(0.5)]  # the last two blocks
    found = policy_loss(chance, keeps, advantage, free=2)
    assert found.item() == pytest.approx(-(2 * likelihood[0] - likelihood[1]) / 2, rel=1e-5)


def test_blockdrop_policy_phase_by_hand(tmp_path):
    """The loss of a batch of one image; the network gets no gradient, the policy does."""
    model, batch = model_and_batch(TASKS[:1], (1,))
    config = small_config(tmp_path, "blockdrop")
    method, bench = method_of(model.eval(), config), Bench()
    with torch.no_grad():
        model.selector.heads[0].bias.view(3, 4)[:, 3] = torch.tensor([1.0, -1.0, 0.5])
    objective = method.objective(bench, method.phases()[1], batch)
    objective.loss.backward()
    assert all(p.grad is None for p in model.estimator.parameters())
    assert model.selector.heads[0].bias.grad.view(3, 4)[:, 1:3].abs().sum() == 0
    drawn, greedy, chance = draw(method.logits(batch.images, batch.tasks), 3, 0.8, generator())
    gains = []
    for keeps in (drawn, greedy):
        with torch.no_grad():
            right = (model.estimator(batch.images[0], "a", keeps.long() * 3).argmax(1) == batch.labels[0]).float()
        gains.append(rewards(keeps, right, 1.0))
    expected = policy_loss(chance, drawn, gains[0] - gains[1], 3)
    assert objective.loss.item() == pytest.approx(expected.item(), abs=1e-6)
