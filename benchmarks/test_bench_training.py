"""Training steps: the estimator's at structures of equation 8, the selector's by REINFORCE, against dense ones."""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from den.nn.count import count_flops, image_flops
from den.nn.task_batch import task_batch
from den.train.objective import leave_one_out_advantage, parameter_fractions, reinforce, sparsity_penalty
from den_kernels import RoutingPlan

from .allocations import require
from .elastic_network import ElasticNetwork
from .harness import Case, Expected, Provider, Settings, Work, expect, provide, run
from .parameters import checked, everywhere
from .training_peers import TrainingPass, gradients

# Rounding decides now and then on which side of a ReLU a value falls: that changes the gradients of every block before
# it, by up to 2.5 % of their largest value in WRN-32-4, in one float32 pass and not in another.
FACTOR, LEAST = 4.0, 0.05
SAMPLES = 8
ESTIMATOR = [
    *[Case("training-estimator", "demo", 64, mix, "float32") for mix in ("tau0.75", "tau0.25")],
    Case("training-estimator", "wrn32_4", 16, "tau0.25", "float32"),
]
GPU = [Case("training-estimator", "wrn32_4", 256, "tau0.75", "bfloat16")]  # under autocast
TINY = [Case("training-estimator", "wrn8_1", 2, "tau0.75", "float32")]  # a simulated GPU knows no autocast
SELECTOR = [Case("training-selector", "demo", 32, "recorded-fashion", "float32")]


def labels_of(network: ElasticNetwork) -> Tensor:
    """int64 [B]."""
    return torch.arange(len(network.images), device=network.images.device) % network.task.classes


def training_pass(network: ElasticNetwork, levels: Tensor | None) -> TrainingPass:
    """Forward pass in plain PyTorch over the network's own parameters; levels: [B, N], None: the full structure."""
    return TrainingPass(network.model.estimator, task_index(network), levels)


def task_index(network: ElasticNetwork) -> int:
    """The position of the network's task in its model."""
    return [task.name for task in network.model.tasks].index(network.task.name)


def in_dtype(network: ElasticNetwork, dtype: torch.dtype) -> ElasticNetwork:
    """A copy in another dtype, the estimator and the selector in training mode."""
    model = copy.deepcopy(network.model).to(dtype=dtype).train()
    return replace(network, model=model, images=network.images.to(dtype))


def autocast(images: Tensor, half: bool) -> torch.autocast:
    """Autocast to bfloat16 where `half` asks for it and the images [B, c, S, S] are not an oracle's float64."""
    return torch.autocast(images.device.type, torch.bfloat16, enabled=half and images.dtype == torch.float32)


def plain_step(network: ElasticNetwork, logits: Callable[[Tensor], Tensor], half: bool) -> list[Tensor]:
    """Loss [] and gradients of the estimator, by a pass in plain PyTorch; half: under autocast.

    logits: images [B, c, S, S] -> [B, classes].
    """
    with autocast(network.images, half):
        loss = F.cross_entropy(logits(network.images).to(network.images), labels_of(network))
    return gradients(loss, network.model.estimator)


def step_expectation(network: ElasticNetwork, full: bool, half: bool) -> Expected:
    """The oracle: loss and gradients of the plain training pass."""

    def step(dtype: torch.dtype) -> list[Tensor]:
        here = in_dtype(network, dtype)
        return plain_step(here, training_pass(here, None if full else here.levels).logits, half)

    return expect(step, torch.float32, FACTOR, LEAST)


def estimator_providers(network: ElasticNetwork, half: bool = False, compiles: bool = False) -> list[Provider]:
    """Ours with the plan in the timing; the dense step, also compiled; the masked one. half: under autocast."""
    labels, images, estimator = labels_of(network), network.images, network.model.estimator.train()

    def ours() -> list[Tensor]:
        plan = RoutingPlan.from_levels(network.levels, groups=network.model.levels - 1)
        with autocast(images, half):
            loss = F.cross_entropy(estimator(images, network.task, plan).float(), labels)
        return gradients(loss, estimator)

    chosen, whole = (step_expectation(network, full, half) for full in (False, True))
    dense, masked = (training_pass(network, levels).logits for levels in (None, network.levels))
    passes = {"dense-eager": dense, "masked": masked} | ({"dense-compiled": torch.compile(dense)} if compiles else {})
    steps = {name: functools.partial(plain_step, network, logits, half) for name, logits in passes.items()}
    return provide({"ours": ours, **steps}, chosen, whole)


@pytest.mark.training
@pytest.mark.parametrize("case", [*everywhere(ESTIMATOR), *checked(GPU, TINY)])
def test_estimator_step(benchmark: Any, case: Case, settings: Settings) -> None:
    require(case.id, 4 * case.batch * 64 * 32 * 32)
    network = ElasticNetwork.make(replace(case, dtype="float32"))
    cost, image = count_flops(network.model, network.levels).sum().item(), image_flops(network.model, network.task)
    ends, dense = case.batch * (image.stem + image.head), case.batch * image.blocks
    work = Work(3 * (cost + ends), 3 * (dense + ends), 3 * network.traffic())
    providers = estimator_providers(network, case.dtype == "bfloat16", settings.compile == "all")
    run(benchmark, case, providers, work, settings, trains=True)


def selector_step(network: ElasticNetwork, structures: Tensor, logits: Callable[[], Tensor]) -> list[Tensor]:
    """The loss of equation 7 and its gradients; ``logits`` [B * S, classes] under structures [B, S, N]."""
    model = network.model
    chances = model.selector_logits(network.images, network.task).log_softmax(-1)
    with torch.no_grad():
        losses = F.cross_entropy(logits(), labels_of(network).repeat_interleave(SAMPLES), reduction="none")
        costs = losses.view(-1, SAMPLES) + sparsity_penalty(structures, parameter_fractions(model).to(losses), 0.2)
    return gradients(reinforce(chances, structures, leave_one_out_advantage(costs), 0.05), model.selector)


def sampled(network: ElasticNetwork) -> ElasticNetwork:
    """The network with a structure for each of the samples of each image."""
    return replace(network, levels=network.levels.repeat_interleave(SAMPLES, 0).roll(3, 0))


def selector_expectation(network: ElasticNetwork, kind: str) -> Expected:
    """The oracle: the estimator ``kind`` "bucketed" at the structures, or "dense"."""

    def step(dtype: torch.dtype) -> list[Tensor]:
        here = in_dtype(network, dtype)
        here.model.estimator.eval()
        plain = getattr(sampled(here), kind)(dtype)
        structures = sampled(here).levels.view(len(here.images), SAMPLES, -1).long()
        return selector_step(here, structures, lambda: plain(here.images, SAMPLES))

    return expect(step, torch.float32, FACTOR, LEAST)


def selector_providers(network: ElasticNetwork) -> list[Provider]:
    """The estimator run on all samples at once: by the kernels, dense, masked, bucketed."""
    model, images, many = network.model, network.images, sampled(network)
    model.selector.train()
    structures = many.levels.view(len(images), SAMPLES, -1).long()
    batch = task_batch(images, network.task, model.tasks, like=images)
    chosen, whole = selector_expectation(network, "bucketed"), selector_expectation(network, "dense")
    plain = {"dense-eager": many.dense(network.dtype), "masked": many.masked(), "bucket": many.bucketed(network.dtype)}
    logits: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: model.estimator.part_logits(batch, structures)[0],
        **{name: functools.partial(one, images, SAMPLES) for name, one in plain.items()},
    }
    steps = {name: functools.partial(selector_step, network, structures, one) for name, one in logits.items()}
    return provide(steps, chosen, whole)


@pytest.mark.training
@pytest.mark.parametrize("case", everywhere(SELECTOR))
def test_selector_step(benchmark: Any, case: Case, settings: Settings) -> None:
    """A step on SAMPLES structures of every image; the estimator rests, as in Algorithm 1."""
    require(case.id, SAMPLES * case.batch * 64 * 32 * 32)
    network = ElasticNetwork.make(case)
    network.model.estimator.eval()
    many, image = sampled(network), image_flops(network.model, network.task)
    fixed = case.batch * (image.stem + 3 * image.selector + SAMPLES * image.head)
    cost = count_flops(network.model, many.levels).sum().item()
    work = Work(cost + fixed, case.batch * SAMPLES * image.blocks + fixed, many.traffic())
    run(benchmark, case, selector_providers(network), work, settings, trains=True)
