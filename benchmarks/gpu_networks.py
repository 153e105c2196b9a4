"""Whole networks on a GPU: inference of WRN-32-4 from images to logits, and one training step of its estimator."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.train.objective import initial_structures
from den_kernels import RoutingPlan

from . import peers
from .elastic_network import TASK, ElasticNetwork
from .gpu_clock import Contender, compete
from .gpu_numerics import relative_error
from .gpu_times import compiled, fast_convolutions, suffix
from .gpu_worker import Check, Context
from .harness import Case, Work

Row = dict[str, Any]
Network = Callable[[Tensor], Tensor]
UNIFORM = 16 / 7  # times fewer FLOPs than full when levels 0, 1/4, 1/2 and 1 are equally likely
MIXES = {"uniform": None, "full": 3, "quarter": 1, "zero": 0}  # the level of all blocks; None: drawn evenly
TOLERANCE = 5e-2  # of logits in bfloat16 after 31 convolutions


def inference_checks(context: Context, mode: str = "default") -> list[Check]:
    """One case: the dense network is compiled once."""
    return [Check(f"network/wrn32_4/bfloat16{suffix(mode)}", functools.partial(time_network, mode))]


def training_checks(context: Context) -> list[Check]:
    """Forward and backward with structures of equation 8."""
    return [Check("training/wrn32_4/bfloat16", time_training)]


def networks(context: Context) -> dict[str, ElasticNetwork]:
    """The network on the CPU with the structures of every mix; they share weights and images."""
    name, batch = ("wrn8_1", 2 if context.rehearse else 8) if context.tiny else ("wrn32_4", 256)
    uniform = ElasticNetwork.make(Case("network", name, batch, "2x" if context.tiny else f"{UNIFORM}x", "bfloat16"))
    return {
        mix: uniform if level is None else dataclasses.replace(uniform, levels=torch.full_like(uniform.levels, level))
        for mix, level in MIXES.items()
    }


def on(network: ElasticNetwork, context: Context) -> ElasticNetwork:
    """The same on the device."""
    here = context.place
    return ElasticNetwork(network.model.to(here), network.images.to(here), network.levels.to(here))


def dense_networks(dense: peers.DenseNetwork, images: Tensor, mode: str, context: Context) -> dict[str, Network]:
    """The full structure in nn.Conv2d: eager, bn2 folded, and that compiled."""
    folded = dense.with_blocks([peers.FoldedBlock(block) for block in dense.blocks]).eval()
    found: dict[str, Network] = {"dense-eager": dense, "dense-folded": folded}
    return found | compiled(folded, images, mode, context)


def time_network(mode: str, context: Context) -> Row:
    """Selector, plan, stem, blocks and head against the dense network without a selector."""
    with torch.inference_mode(), fast_convolutions(True):
        made = networks(context)
        works = {f"ours {mix}": network.work() for mix, network in made.items()}
        dense = made["uniform"].dense(torch.bfloat16).to(context.place)
        here = {mix: on(network, context) for mix, network in made.items()}
        images = here["uniform"].images
        sets = [images, *(torch.randn_like(images) for _ in range(context.size(3, 1)))]
        calls = dense_networks(dense, images, mode, context)
        error = check_full_network(here["full"], dense)
        contenders = [Contender(name, "dense", lambda i, call=call: call(sets[i])) for name, call in calls.items()]
        works |= dict.fromkeys(calls, works["ours full"])
        for mix, network in here.items():
            per_set = [dataclasses.replace(network, images=one) for one in sets]
            contenders.append(Contender(f"ours {mix}", "ours", lambda i, per_set=per_set: per_set[i].forward()))
        return compete(contenders, len(sets), works, "bfloat16", context) | {"relative_error": error}


def check_full_network(network: ElasticNetwork, dense: nn.Module) -> float:
    """The full structure is the dense network."""
    error = relative_error(network.forward(), dense(network.images))
    assert error <= TOLERANCE, f"logits err by {error:.3g}, allowed are {TOLERANCE}"
    return error


def time_training(context: Context) -> Row:
    """Under autocast: ours with plan and structures of equation 8 (tau = 0.75), the dense network at full structure."""
    made = networks(context)["uniform"]
    model, batch, here = made.model, len(made.images), context.place
    drawn = [structures(made, seed) for seed in range(2)]
    full = torch.full_like(drawn[0], model.levels - 1)
    works = {"ours eq. 8": training_work(made, drawn[0])}
    dense = made.dense(torch.float32).to(here).to(memory_format=torch.channels_last).train()
    functions: dict[str, Network] = {"dense-eager": dense}
    if context.compiles and not context.warm:
        torch._dynamo.reset()
        functions["dense-compiled"] = torch.compile(dense)
    works |= dict.fromkeys(functions, training_work(made, full))
    estimator = model.estimator.float().to(here).train()
    images = [peers.channels_last(torch.randn(made.images.shape, device=here)) for _ in drawn]
    labels, chosen = torch.arange(batch, device=here) % TASK.classes, [levels.to(here) for levels in drawn]

    def ours(i: int) -> object:
        plan = RoutingPlan.from_levels(chosen[i], model.levels - 1)
        return step(estimator, lambda x: estimator(x, TASK, plan), images[i], labels)

    contenders = [Contender("ours eq. 8", "ours", ours)]
    for name, function in functions.items():
        call = functools.partial(step, dense, function)
        contenders.append(Contender(name, "dense", lambda i, call=call: call(images[i], labels)))
    with fast_convolutions(True):
        return compete(contenders, len(images), works, "bfloat16", context)


def structures(network: ElasticNetwork, seed: int) -> Tensor:
    """Structures of equation 8, int64 [B, N]."""
    model, generator = network.model, torch.Generator().manual_seed(seed)
    return initial_structures(len(network.images), model.num_blocks, model.levels, 0.75, generator)


def step(module: nn.Module, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> object:
    """Forward under autocast in bfloat16, the loss, and the gradients of all parameters in use."""
    with torch.autocast(images.device.type, torch.bfloat16):
        loss = F.cross_entropy(forward(images).float(), labels)
    return torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)


def training_work(network: ElasticNetwork, levels: Tensor) -> Work:
    """Three times the products of inference without the selector; the maps of each block three times there and back."""
    estimator = network.model.estimator
    costs = estimator.level_flops.cpu().double()
    chosen = costs.gather(1, levels.long().t()).sum().item()
    full = costs[:, -1].sum().item() * len(levels)
    return Work(3 * chosen, 3 * full, 3 * dataclasses.replace(network, levels=levels).traffic())
