"""Batch norm with ReLU in training, forward and backward, over the instances that use a channel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from den_kernels import RoutingPlan, dynamic_batch_norm

from . import peers
from .allocations import require
from .harness import DTYPES, Case, Provider, Settings, Work, expect, provide, run
from .mixes import mix_levels
from .parameters import everywhere
from .training_peers import masked_norm

CASES = [
    *[Case("norm", shape, 32, "uniform", "float32") for shape in ("64x32x32", "128x16x16", "256x8x8")],
    Case("norm", "128x16x16", 32, "full", "float32"),
]
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, weight, bias -> y


@dataclass
class Operands:
    """One case's tensors, on the CPU or a device."""

    x: Tensor  # [B, C, H, W] channels-last
    grad: Tensor  # of the output
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    levels: Tensor  # int32 [B]
    sizes: tuple[int, ...]

    @classmethod
    def make(cls, case: Case) -> Operands:
        """Random values; groups of a quarter, a quarter and a half."""
        channels, side, _ = map(int, case.shape.split("x"))
        require(case.id, case.batch * channels * side * side)
        generator = torch.Generator().manual_seed(0)
        maps = [torch.randn(case.batch, channels, side, side, generator=generator) for _ in range(2)]
        weight = torch.rand(channels, generator=generator) + 0.5
        bias = torch.randn(channels, generator=generator) * 0.2
        sizes = (channels // 4, channels // 4, channels // 2)
        levels = mix_levels(case.mix, case.batch)
        return cls(*map(peers.channels_last, maps), weight, bias, levels, sizes).to(case.device, DTYPES[case.dtype])

    def to(self, device: str, dtype: torch.dtype) -> Operands:
        """Copy of the operands on a device, the maps in another dtype."""
        affine = self.weight.to(device, dtype), self.bias.to(device, dtype)
        return Operands(
            self.x.to(device, dtype), self.grad.to(device, dtype), *affine, self.levels.to(device), self.sizes
        )

    @property
    def selection(self) -> Tensor:
        """bool [B, C]: the channels that each instance uses."""
        return peers.select_levels(self.levels, self.sizes)

    def work(self) -> Work:
        """Ten FLOPs a value both ways; traffic: x twice and the gradient once where used, both results written."""
        share = self.selection.double().mean().item()
        values = self.x.numel()
        return Work(10 * values * share, 10 * values, self.x.nbytes * (3 * share + 2))


def there_and_back(norm: Norm, operands: Operands) -> list[Tensor]:
    """The output and the gradients of input, weight and bias."""
    inputs = [tensor.detach().requires_grad_() for tensor in (operands.x, operands.weight, operands.bias)]
    y = norm(*inputs)
    return [y, *torch.autograd.grad(y, inputs, operands.grad)]


def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Batch norm of x [B, C, H, W] over every instance and channel, and ReLU; weight and bias: [C]."""
    return F.relu(F.batch_norm(x, None, None, weight, bias, training=True))


def bucketed(operands: Operands) -> Norm:
    """Group by group: gather the instances that use it, batch norm as usual, scatter. In float64 the oracle."""
    bounds = torch.tensor((0, *operands.sizes)).cumsum(0).tolist()
    rows = [(operands.levels > group).nonzero().flatten() for group in range(len(operands.sizes))]

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # [B, C, H, W], [C], [C]
        y = torch.zeros_like(x)
        for users, first, last in zip(rows, bounds, bounds[1:], strict=False):
            part = dense(x[users, first:last], weight[first:last], bias[first:last])
            y[users, first:last] = part
        return y

    return norm


def providers_of(operands: Operands) -> list[Provider]:
    """Ours, the dense batch norm, statistics from masked sums, and group by group."""
    dtype, mask = operands.x.dtype, operands.selection
    route = RoutingPlan.from_levels(operands.levels[:, None], len(operands.sizes))[0]

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # [B, C, H, W], [C], [C]
        return dynamic_batch_norm(x, route, weight, bias, None, None, groups=operands.sizes, training=True, relu=True)

    def masked(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # [B, C, H, W], [C], [C]
        return F.relu(masked_norm(x, mask, weight, bias))

    def oracle(kind: Callable[[Operands], Norm]) -> Any:
        def in_dtype(dtype: torch.dtype) -> list[Tensor]:
            other = operands.to(operands.x.device, dtype)
            return there_and_back(kind(other), other)

        return expect(in_dtype, dtype, factor=4.0)

    norms = {"ours": ours, "dense-eager": dense, "masked": masked, "bucket": bucketed(operands)}
    steps = {name: functools.partial(there_and_back, norm, operands) for name, norm in norms.items()}
    return provide(steps, oracle(bucketed), oracle(lambda _: dense))


@pytest.mark.op
@pytest.mark.norm
@pytest.mark.training
@pytest.mark.parametrize("case", everywhere(CASES))
def test_norm(benchmark: Any, case: Case, settings: Settings) -> None:
    operands = Operands.make(case)
    run(benchmark, case, providers_of(operands), operands.work(), settings, trains=True)
