"""A dynamic convolution in training: forward, the gradient of its input and the gradient of its weight."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from . import peers
from .allocations import require
from .harness import Case, Provider, Settings, Work, expect, provide, run
from .parameters import everywhere
from .shapes import Shape
from .test_bench_conv import Convolve, Operands, make_operands, masked, ours, way, work_of

SHAPES = (("64x32x32", 32), ("128x16x16", 32), ("256x8x8", 32))
CASES = [
    *[Case("conv-out-training", *shape, "uniform", "float32") for shape in SHAPES],
    Case("conv-in-training", "128x16x16", 32, "uniform", "float32"),
    *[Case("conv-out-training", *shape, "uniform", "bfloat16") for shape in SHAPES[:2]],
]


def there_and_back(convolve: Convolve, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and the gradients of x and weight; x, grad and output: [B, C, H, W], weight: [C, C, 3, 3]."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight)]
    y = convolve(*inputs)
    return [y, *torch.autograd.grad(y, inputs, grad)]


def bucketed(operands: Operands) -> Convolve:
    """Level by level: gather the instances, convolve with the weight's slice, scatter."""
    parts = []
    for segment in peers.segments(peers.select_channels(operands.groups, operands.sizes)):
        channels = peers.as_slice(segment.channels)
        outputs, inputs = (
            channels if elastic else slice(None) for elastic in (operands.out_elastic, operands.in_elastic)
        )
        parts.append((segment.rows.to(operands.x.device), outputs, inputs))

    def convolve(x: Tensor, weight: Tensor) -> Tensor:  # [B, C, H, W], [C, C, 3, 3]
        y = torch.zeros_like(x)
        for rows, outputs, inputs in parts:
            part = F.conv2d(peers.channels_last(x[rows, inputs]), weight[outputs][:, inputs], padding=1)
            y[rows, outputs] = part
        return y

    return convolve


def providers_of(operands: Operands) -> list[Provider]:
    """Ours, the dense convolution, masks (in float64 the oracle), and level by level."""
    generator = torch.Generator().manual_seed(1)
    grad = peers.channels_last(torch.randn(operands.x.shape, generator=generator).to(operands.x))
    tensors = operands.x, operands.conv.weight.detach(), grad

    def oracle(convolve: Convolve) -> Any:
        return expect(lambda d: there_and_back(convolve, *(t.to(d) for t in tensors)), operands.x.dtype, 4.0)

    dense = functools.partial(F.conv2d, padding=1)
    calls = {"ours": ours(operands), "dense-eager": dense, "masked": masked(operands), "bucket": bucketed(operands)}
    steps = {name: functools.partial(there_and_back, call, *tensors) for name, call in calls.items()}
    return provide(steps, oracle(masked(operands)), oracle(dense))


def training_work(operands: Operands) -> Work:
    """Three convolutions' FLOPs; traffic: what the forward pass moves, and twice that for the gradients."""
    forward = work_of(operands)
    return Work(3 * forward.flops, 3 * forward.dense_flops, 3 * forward.traffic)


@pytest.mark.op
@pytest.mark.conv
@pytest.mark.training
@pytest.mark.parametrize("case", everywhere(CASES))
def test_conv_training(benchmark: Any, case: Case, settings: Settings) -> None:
    require(case.id, 4 * Shape.parse(case.shape).values(case.batch))
    operands = make_operands(case).to(case.device)
    run(benchmark, case, providers_of(operands), training_work(operands), settings, trains=True)
    benchmark.extra_info["way"] = way(operands)
