"""The dynamic convolution against float64, in every dtype: output, all gradients, the same bits twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from den_kernels import dynamic_conv2d
from den_kernels.testing import ConvCase, assert_as_accurate, error_units, masked_conv2d
from tests.on_gpu import DTYPES, TF32, WAYS, Context, moved, numerics, relative_error

Row = dict[str, Any]
Convolve = Callable[..., Tensor]
Record = Callable[[Row], None]

QUARTERS = (16, 16, 32)
ODD = (13, 27)  # groups that end inside tiles
CONVOLUTIONS = {
    "out": ConvCase(channels=(24, 1), out_sizes=QUARTERS),
    "in": ConvCase(channels=(1, 24), in_sizes=QUARTERS, out_sizes=()),
    "both, stride 2": ConvCase(in_sizes=QUARTERS, out_sizes=QUARTERS, stride=2),
    "wide": ConvCase(batch=9, size=(16, 16), channels=(128, 1), out_sizes=(64, 64, 128)),
    "wide in": ConvCase(batch=9, size=(8, 8), channels=(1, 256), in_sizes=(64, 64, 128), out_sizes=()),
    "odd, stride (2, 1), dilation": ConvCase(channels=(7, 1), out_sizes=ODD, stride=(2, 1), dilation=(1, 2)),
    "5x5, stride (3, 2)": ConvCase(
        channels=(1, 5), in_sizes=ODD, out_sizes=(), kernel=(5, 5), stride=(3, 2), padding=(2, 0), dilation=(2, 1)
    ),
    "1x1": ConvCase(kernel=(1, 1), padding=0, in_sizes=(32, 32), out_sizes=(64, 64)),
    "7x7, 63": ConvCase(kernel=(7, 7), padding=3, size=(9, 8), channels=(3, 1), out_sizes=(31, 32), stride=2),
    "dilated, stride 2": ConvCase(channels=(16, 1), out_sizes=(16, 16), stride=2, dilation=2, padding=2),
    "mask": ConvCase(in_sizes=QUARTERS, out_sizes=QUARTERS, selection="mask"),
    "mask of outputs": ConvCase(channels=(20, 1), out_sizes=(32, 32), selection="mask", stride=2),
    "odd mask": ConvCase(in_sizes=ODD, out_sizes=(11, 2), selection="mask"),
    "cardinality": ConvCase(cardinality=4, in_sizes=QUARTERS, out_sizes=(32, 32, 64)),
    "cardinality of outputs": ConvCase(cardinality=8, channels=(32, 1), out_sizes=(16, 48), stride=2),
    "cardinality, mask": ConvCase(cardinality=4, in_sizes=(4, 12), out_sizes=(16, 48), selection="mask"),
    "depthwise": ConvCase(cardinality=40, in_sizes=(8, 32), out_sizes=(8, 32)),
    "NCHW": ConvCase(channels=(24, 1), out_sizes=QUARTERS, layout="contiguous", weight_channels_last=False),
    "slice": ConvCase(channels=(24, 1), out_sizes=QUARTERS, layout="channels_last slice"),
    "transposed": ConvCase(channels=(24, 1), out_sizes=QUARTERS, layout="transposed", size=(8, 8)),
    "nobody": ConvCase(in_sizes=(16, 16), out_sizes=(), channels=(1, 20), selection="zero"),
    "last only": ConvCase(out_sizes=(16, 16), in_sizes=(16, 16), selection="last only", bias=False),
    "B=0": ConvCase(batch=0, out_sizes=(16, 16)),
    "B=1": ConvCase(batch=1, out_sizes=(16, 16), selection="top"),
    "B=257": ConvCase(batch=257, size=(8, 8), channels=(32, 1), out_sizes=QUARTERS),
}


SMALL = ConvCase(batch=3, size=(5, 4), channels=(8, 1), out_sizes=(8, 8))  # in a rehearsal


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_convolution(way: str, convolution: str, context: Context, record: Record) -> None:
    record(check_convolution(CONVOLUTIONS[convolution], way, context))


@pytest.mark.smoke
def test_convolution_first(context: Context, record: Record) -> None:
    """Forward and backward of one case."""
    record(check_convolution(SMALL if context.tiny else CONVOLUTIONS["out"], "bfloat16", context))


def check_convolution(case: ConvCase, way: str, context: Context, convolve: Convolve = dynamic_conv2d) -> Row:
    """Output and all gradients err at most twice as much as PyTorch's own, and come out the same twice."""
    dtype, tf32 = DTYPES[way]
    x, weight, bias, selection = case.tensors(dtype)
    if way == "tf32":  # the case's values are those of bfloat16, which TF32 would not round
        x, weight = x * 1.2345, weight * 0.9876

    def run(function: Convolve, device: torch.device, of: Callable[[Tensor], Tensor] = torch.detach) -> list[Tensor]:
        leaves = [None if t is None else of(moved(t, device)).requires_grad_() for t in (x, weight, bias)]
        y = function(*leaves, selection.to(device), **case.keywords)
        seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
        wanted = [leaf for leaf in leaves if leaf is not None]
        return [y.detach(), *torch.autograd.grad(y, wanted, of(seed.to(device)))]

    with numerics(tf32):
        first, second = (run(convolve, context.place) for _ in range(2))
        peer = run(masked_conv2d, context.place)
    exact, scale = (run(masked_conv2d, torch.device("cpu"), of) for of in (Tensor.double, absolute))
    return compare(first, second, peer, exact, scale, dtype, tf32)


def absolute(x: Tensor) -> Tensor:
    """The sizes of the terms, in float64."""
    return x.double().abs()


def compare(
    first: list[Tensor], second: list[Tensor], peer: list[Tensor], exact: list[Tensor], scale: list[Tensor],
    dtype: torch.dtype, tf32: bool,
) -> Row:  # fmt: skip
    """Assert that results are as accurate as PyTorch's and come out the same twice; their relative errors."""
    errors = {}
    for name, got, again, theirs, right, size in zip(
        ("y", "dx", "dweight", "dbias"), first, second, peer, exact, scale, strict=False
    ):
        got, again, theirs = (t.detach().cpu() for t in (got, again, theirs))
        factor = 2.0
        if tf32 and got.numel():  # PyTorch need not use TF32 where it may
            own = max(float(error_units(theirs, right, size).max()), torch.finfo(dtype).eps / 2)
            factor = 2 * max(1.0, TF32 / own)
        try:
            assert_as_accurate(got, theirs, right, size, factor)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        assert torch.equal(got, again), f"{name}: two calls give different bits"
        errors[name] = relative_error(got, right)
    return {"errors": errors}


def test_levels_out_of_range_are_clamped(context: Context) -> None:
    """On a GPU, where nobody reads them back; a CPU refuses them."""
    x, weight, _, _ = ConvCase(channels=(16, 1), out_sizes=QUARTERS, bias=False).tensors(torch.float32)
    wild = torch.tensor([-7, 99, 2, 0, 4])
    x, weight, wild = (moved(t, context.place) for t in (x, weight, wild))
    tame = wild.clamp(0, 3)
    got, right = (dynamic_conv2d(x, weight, None, levels, padding=1, out_groups=QUARTERS) for levels in (wild, tame))
    assert torch.equal(got, right), "levels out of range must count as clamped"
