"""Weighing of losses and combining of gradients: against the papers' formulas, written anew, and in runs."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from den.dag.config import DagDataConfig
from den.recipes.dag.balance import Balance, dwa_factors
from den.recipes.dag.gradients import cagrad, combined_backward, pcgrad
from den.recipes.dag.recipe import SearchRecipe
from den.recipes.dag.search import train, train_step
from den.support.device import CPU
from den.train.checkpoint import load_checkpoint
from den.train.engine import Engine
from tests.dag.test_dag_search import three_tasks, tiny  # noqa: F401  a fixture
from tests.small_runs import train_interrupted

pytestmark = pytest.mark.filterwarnings("ignore:the gates of some tasks differ little")


def vectors(count, size=6, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def test_gradients_that_agree_are_added_up():
    gradients = vectors(3).abs()
    for coefficients in (pcgrad(gradients @ gradients.T, torch.Generator()), cagrad(gradients @ gradients.T, 0.0)):
        torch.testing.assert_close(coefficients, torch.ones(3))


def test_pcgrad_is_the_projection_of_its_paper():
    differs = False
    for seed in range(10):
        gradients = vectors(4, seed=seed)
        draw, total = torch.Generator().manual_seed(seed), torch.zeros(6)
        for i in range(4):
            own = gradients[i].clone()
            for j in torch.randperm(4, generator=draw).tolist():
                if i != j and own @ gradients[j] < 0:
                    own -= (own @ gradients[j]) / gradients[j].norm() ** 2 * gradients[j]
            total += own
        coefficients = pcgrad(gradients @ gradients.T, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(coefficients @ gradients, total, rtol=1e-4, atol=1e-4)
        differs |= not torch.allclose(coefficients, torch.ones(4))
    assert differs
    opposite = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    torch.testing.assert_close(pcgrad(opposite @ opposite.T, torch.Generator()) @ opposite, torch.zeros(2))


@pytest.mark.parametrize("c", [0.2, 0.5])
def test_cagrad_helps_the_worst_off_task_most_within_its_ball(c):
    """For two tasks the dual is a search along a line; and no other direction in the ball does better for both."""
    generator = torch.Generator().manual_seed(3)
    for seed in range(6):
        gradients = vectors(2, seed=seed)
        found = cagrad(gradients @ gradients.T, c) @ gradients * (1 + c**2) / 2
        mean = gradients.mean(0)
        radius = c * mean.norm()
        assert (found - mean).norm() <= radius * (1 + 1e-4)

        def dual(w, gradients=gradients, mean=mean, radius=radius):
            mixed = w * gradients[0] + (1 - w) * gradients[1]
            return float(mixed @ mean + radius * mixed.norm())

        w = minimize_scalar(dual, bounds=(0, 1), method="bounded").x
        mixed = w * gradients[0] + (1 - w) * gradients[1]
        torch.testing.assert_close(found, mean + radius * mixed / mixed.norm(), rtol=2e-2, atol=2e-2)
        others = mean + radius * torch.nn.functional.normalize(torch.randn(300, 6, generator=generator), dim=1)
        assert float((others @ gradients.T).amin(1).max()) <= float((gradients @ found).min()) + 1e-3


def test_tasks_without_a_gradient_change_nothing():
    gradients = vectors(3)
    gradients[1] = 0
    for coefficients in (pcgrad(gradients @ gradients.T, torch.Generator()), cagrad(gradients @ gradients.T, 0.4)):
        assert (coefficients @ gradients).isfinite().all()
    assert cagrad(torch.zeros(3, 3), 0.4).isfinite().all()


def test_combined_backward_leaves_what_is_not_shared_alone():
    shared, own = torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor(3.0))
    losses = torch.stack([shared[0] * own, -shared[0] + shared[1]])
    extra = own**2
    combined_backward(losses, losses.sum() + extra, [shared], lambda products: torch.tensor([2.0, 10.0]))
    assert shared.grad.tolist() == [2 * 3.0 - 10, 10.0]
    assert own.grad.item() == 1.0 + 6.0  # the sum's


def test_uncertainty_reaches_its_minimum_where_the_papers_is():
    balance = Balance("uncertainty", (1.0, 2.0), CPU)
    assert balance.weighted(torch.tensor([3.0, 5.0])).tolist() == [3.0, 10.0]
    optimiser = torch.optim.SGD(balance.parameters, 0.1)
    for _ in range(300):
        optimiser.zero_grad()
        balance.weighted(torch.tensor([3.0, 5.0])).sum().backward()
        optimiser.step()
    assert balance.log_variances.tolist() == pytest.approx([math.log(3), math.log(10)], abs=1e-3)


def test_dwa_weighs_by_how_fast_losses_fell():
    balance = Balance("dwa", (1.0, 1.0), CPU)
    for losses in ([4.0, 2.0], [2.0, 2.0], [1.0, 2.0], [1.0, 2.0]):  # two updates an epoch
        balance.add(torch.tensor(losses))
        if losses == [2.0, 2.0]:
            balance.end_epoch()
            assert balance.weighted(torch.ones(2)).tolist() == [1.0, 1.0]
    balance.end_epoch()
    ratios = np.array([1.0 / 3.0, 1.0])
    wanted = 2 * np.exp(ratios / 2) / np.exp(ratios / 2).sum()
    assert balance.weighted(torch.ones(2)).tolist() == pytest.approx(wanted.tolist())
    assert dwa_factors(ratios) == pytest.approx(wanted.tolist())
    again = Balance("dwa", (1.0, 1.0), CPU)
    again.restore(balance.record())
    assert torch.equal(again.weighted(torch.ones(2)), balance.weighted(torch.ones(2)))


@pytest.mark.parametrize(
    "options", [{"balance": "uncertainty"}, {"balance": "dwa", "gradients": "pcgrad"}, {"gradients": "cagrad"}]
)
def test_runs_continue_to_the_same_weights(tmp_path, monkeypatch, options):
    whole = train(tiny(tmp_path / "whole", options))
    train_interrupted(tiny(tmp_path / "broken", options), monkeypatch, 9, train)
    for name, tensor in train(tiny(tmp_path / "broken", options), resume=True).state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    records = [load_checkpoint(tmp_path / name / "last.safetensors")[1]["balance"] for name in ("whole", "broken")]
    assert records[0] == records[1]
    assert any(records[0]["log_variances"]) == (options.get("balance") == "uncertainty")
    plain = train(tiny(tmp_path / "plain"))
    assert not torch.equal(plain.edges[0].conv.weight, whole.edges[0].conv.weight)


def test_gradients_are_combined_of_what_tasks_share_only(tmp_path):
    config = tiny(tmp_path / "run", {"gradients": "pcgrad", "steps": 2, "shares": (1.0, 0.0, 0.0)})
    with Engine(config, SearchRecipe) as engine:
        batch = next(engine.phase("warm-up"))
        objective, model = engine.recipe.objective(engine, batch), engine.model
        objective.loss.backward(retain_graph=True)
        summed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        objective.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert {name.split(".")[0] for name in found if not torch.equal(found[name], summed[name])} == {"edges"}
        train_step(engine, batch)


def test_gradients_of_networks_that_share_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be sum where nothing is shared by all tasks, got pcgrad for single"):
        tiny(tmp_path, {"gradients": "pcgrad"}, mode="single")
    assert dataclasses.replace(tiny(tmp_path, {"gradients": "pcgrad"}), data=DagDataConfig()).training.conflict == 0.4
