"""What one GPU forward must be: free of waiting for the device, capturable with routes that change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import den
from benchmarks.elastic_network import TASK
from den.nn.blocks import ElasticBlock
from den_kernels import RoutingPlan
from den_kernels._triton.clock import recorded
from den_kernels.plan import as_route
from den_kernels.testing import make_levels, make_mask
from tests.gpu_blocks import plain_case
from tests.on_gpu import BATCH, Context, synchronize


@contextlib.contextmanager
def waiting_is_an_error(context: Context) -> Iterator[None]:
    """torch raises at the first operation that makes the host wait for the device."""
    if not context.is_cuda:
        yield
        return
    synchronize(context)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Recording:
    """A call recorded once and replayed: a CUDA graph; on a CPU the call itself. `result` is what it made last."""

    def __init__(self, call: Callable[[], Any], context: Context) -> None:
        def keep() -> None:
            self.result = call()

        self._replay = recorded(keep, context.place)

    def replay(self) -> Any:
        """Run it again; the result."""
        self._replay()
        return self.result


def test_inference_waits_for_nothing(context: Context) -> None:
    """Plan of levels, plan of masks, convolution, block in place and at stride 2."""
    block, x, levels = plain_case(context, torch.bfloat16)
    half, _, _ = plain_case(context, torch.bfloat16, stride=2)
    masks = make_mask(len(x), 3).to(context.place)

    @torch.inference_mode()
    def run() -> None:
        plan = RoutingPlan.from_levels(torch.stack([levels, levels.flip(0)], dim=1), 3)
        y = block(x.clone(memory_format=torch.channels_last), plan[0], inplace=True)
        half(y, plan[1])
        route = RoutingPlan.from_masks(masks[:, None])[0]
        block.conv2(block.conv1(x, route).relu_(), route)

    run()
    with waiting_is_an_error(context):
        run()


def training_step(block: ElasticBlock, x: Tensor, route: Any) -> list[Tensor]:
    """Output and all gradients."""
    y = block(x, route)
    return [y, *torch.autograd.grad(y.square().mean(), [x, *block.parameters()])]


def test_training_waits_for_nothing(context: Context) -> None:
    """Convolutions, batch norms over the instances that use a channel, and their gradients."""
    block, x, levels = plain_case(context)
    block, x = block.train(), x.requires_grad_()

    def run() -> None:
        training_step(block, x, RoutingPlan.from_levels(levels[:, None], 3)[0])

    run()
    with waiting_is_an_error(context):
        run()


def other_routes(batch: int, context: Context) -> list[Tensor]:
    """Levels that a graph was not captured with."""
    kinds = ("zero", "top", "ascending", "last only", "no middle")
    return [make_levels(kind, batch, 3, seed=7).to(context.place) for kind in kinds]


def test_block_graph(context: Context) -> None:
    """The plan is made anew inside the graph; every replay gives the bits of an eager call."""
    block, x, levels = plain_case(context, torch.bfloat16)
    chosen = levels[:, None].clone()
    plan = RoutingPlan.from_levels(chosen, 3)

    @torch.inference_mode()
    def run() -> Tensor:
        plan.update_(chosen)
        return block(x, plan[0])

    recording = Recording(run, context)
    for other in other_routes(len(x), context):
        chosen.copy_(other[:, None])
        got = recording.replay()
        with torch.inference_mode():
            right = block(x, as_route(other, 3, len(x)))
        assert torch.equal(got, right), f"a replay differs from the eager call at levels {other.cpu().tolist()}"


def test_mask_graph(context: Context) -> None:
    """The same with masks, through the public convolution."""
    block, x, _ = plain_case(context, torch.bfloat16)
    chosen = make_mask(len(x), 3)[:, None].to(context.place)
    plan = RoutingPlan.from_masks(chosen)

    @torch.inference_mode()
    def run() -> Tensor:
        plan.update_(chosen)
        return block.conv1(x, plan[0])

    recording = Recording(run, context)
    for seed in (3, 4):
        other = make_mask(len(x), 3, seed=seed, distinct=7).to(context.place)
        chosen.copy_(other[:, None])
        got = recording.replay()
        with torch.inference_mode():
            assert torch.equal(got, block.conv1(x, other)), f"a replay differs from the eager call, masks {seed}"


def test_training_graph(context: Context) -> None:
    """Forward and backward in one graph; replays with other levels give the gradients of an eager step."""
    block, x, levels = plain_case(context)
    block, x = block.train(), x.requires_grad_()
    chosen = levels[:, None].clone()

    def run() -> list[Tensor]:
        return training_step(block, x, RoutingPlan.from_levels(chosen, 3)[0])

    recording = Recording(run, context)
    for other in other_routes(len(x), context):
        chosen.copy_(other[:, None])
        got = recording.replay()
        right = training_step(block, x, as_route(other, 3, len(x)))
        for one, two in zip(got, right, strict=True):
            assert torch.equal(one, two), f"a replay differs from the eager step at levels {other.cpu().tolist()}"


def test_network_graph(context: Context) -> None:
    """Plan, stem, all blocks and head as one graph, replayed with other structures."""
    torch.manual_seed(0)
    model = den.create_model("wrn8_1" if context.tiny else "wrn32_4", [TASK]).to(context.place, torch.bfloat16).eval()
    batch, blocks = context.size(BATCH, 2), model.num_blocks
    images = (
        torch.randn(batch, 3, TASK.size, TASK.size, device=context.place)
        .bfloat16()
        .contiguous(memory_format=torch.channels_last)
    )
    chosen = torch.randint(0, model.levels, (batch, blocks), device=context.place)
    plan = RoutingPlan.from_levels(chosen, model.levels - 1)

    @torch.inference_mode()
    def run() -> Tensor:
        plan.update_(chosen)
        return model.estimator(images, TASK, plan)

    recording = Recording(run, context)
    before = recording.replay().clone()
    for seed in (1, 2):
        torch.manual_seed(seed)
        other = torch.randint(0, model.levels, (batch, blocks), device=context.place)
        chosen.copy_(other)
        got = recording.replay()
        with torch.inference_mode():
            right = model.estimator(images, TASK, RoutingPlan.from_levels(other, model.levels - 1))
        assert torch.equal(got, right), "a replay differs from the eager network"
        assert torch.isfinite(got).all(), "a logit is not finite"
    assert not torch.equal(before, got), "other structures gave the same logits"
