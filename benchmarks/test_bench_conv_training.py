"""A dynamic convolution in training: forward, the gradient of its input and the gradient of its weight."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import den_kernels

from . import peers
from .allocations import require
from .harness import Case, Provider, Settings, Work, expect, provide, run
from .parameters import everywhere
from .shapes import Shape
from .test_bench_conv import Problem, make_problem, route_of, way, work_of

SHAPES = (("64x32x32", 32), ("128x16x16", 32), ("256x8x8", 32))
CASES = [
    *[Case("conv-out-training", *shape, "uniform", "float32") for shape in SHAPES],
    Case("conv-in-training", "128x16x16", 32, "uniform", "float32"),
    *[Case("conv-out-training", *shape, "uniform", "bfloat16") for shape in SHAPES[:2]],
]
Convolve = Callable[[Tensor, Tensor], Tensor]  # x, weight -> y


def there_and_back(convolve: Convolve, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and the gradients of x and weight; x, grad and output: [B, C, H, W], weight: [C, C, 3, 3]."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight)]
    y = convolve(*inputs)
    return [y, *torch.autograd.grad(y, inputs, grad)]


def masked(problem: Problem) -> Convolve:
    """The whole convolution, multiplied by masks. In float64 the oracle."""
    mask = peers.select_channels(problem.groups, problem.sizes)[:, :, None, None]

    def convolve(x: Tensor, weight: Tensor) -> Tensor:  # [B, C, H, W], [C, C, 3, 3]
        scale = mask.to(x.device, x.dtype)
        y = F.conv2d(x * scale if problem.in_elastic else x, weight, padding=1)
        return y * scale if problem.out_elastic else y

    return convolve


def bucketed(problem: Problem) -> Convolve:
    """Level by level: gather the instances, convolve with the weight's slice, scatter."""
    parts = []
    for segment in peers.segments(peers.select_channels(problem.groups, problem.sizes)):
        channels = peers.as_slice(segment.channels)
        outputs, inputs = (
            channels if elastic else slice(None) for elastic in (problem.out_elastic, problem.in_elastic)
        )
        parts.append((segment.rows.to(problem.x.device), outputs, inputs))

    def convolve(x: Tensor, weight: Tensor) -> Tensor:  # [B, C, H, W], [C, C, 3, 3]
        y = torch.zeros_like(x)
        for rows, outputs, inputs in parts:
            part = F.conv2d(peers.channels_last(x[rows, inputs]), weight[outputs][:, inputs], padding=1)
            y[rows, outputs] = part
        return y

    return convolve


def providers_of(problem: Problem) -> list[Provider]:
    """Ours, the dense convolution, masks, and level by level."""
    route, sizes = route_of(problem), problem.sizes
    ours = functools.partial(
        den_kernels.dynamic_conv2d,
        selection=route,
        padding=1,
        out_groups=sizes if problem.out_elastic else None,
        in_groups=sizes if problem.in_elastic else None,
    )
    generator = torch.Generator().manual_seed(1)
    grad = peers.channels_last(torch.randn(problem.x.shape, generator=generator).to(problem.x))
    tensors = problem.x, problem.conv.weight.detach(), grad

    def oracle(convolve: Convolve) -> Any:
        return expect(lambda d: there_and_back(convolve, *(t.to(d) for t in tensors)), problem.x.dtype, 4.0)

    dense = functools.partial(F.conv2d, padding=1)
    calls = {"ours": ours, "dense-eager": dense, "masked": masked(problem), "bucket": bucketed(problem)}
    steps = {name: functools.partial(there_and_back, call, *tensors) for name, call in calls.items()}
    return provide(steps, oracle(masked(problem)), oracle(dense))


def training_work(problem: Problem) -> Work:
    """Three convolutions' FLOPs; traffic: what the forward pass moves, and twice that for the gradients."""
    forward = work_of(problem)
    return Work(3 * forward.flops, 3 * forward.dense_flops, 3 * forward.traffic)


@pytest.mark.op
@pytest.mark.conv
@pytest.mark.training
@pytest.mark.parametrize("case", everywhere(CASES))
def test_conv_training(benchmark: Any, case: Case, settings: Settings) -> None:
    require(case.id, 4 * Shape.parse(case.shape).values(case.batch))
    problem = make_problem(case).to(case.device)
    run(benchmark, case, providers_of(problem), training_work(problem), settings, trains=True)
    benchmark.extra_info["way"] = way(problem)
