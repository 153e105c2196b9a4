"""The CUDA kernels as Python sees them: who takes which problem, errors, and on a GPU the values."""

import dataclasses

import pytest
import torch
from torch import nn

from den_kernels import RoutingPlan, _cuda
from den_kernels._extension import extension
from den_kernels._residual_gpu import masked_branch
from den_kernels.dynamic_residual import dynamic_residual_reference
from den_kernels.plan import as_route
from den_kernels.plan_sort import plan_levels, plan_masks
from den_kernels.residual_weights import ResidualWeights
from den_kernels.testing import assert_as_accurate, make_levels

with_cuda = pytest.mark.skipif(extension is None or not extension.with_cuda, reason="built without CUDA")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LAYOUT = [1, 8, 8, 1, 9, 32, 9, 32, 4]
SIZES = [4, 8, 8, 16, 8, 8, 16, 32, 1]


def folded(C: int = 64, M: int = 64, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> ResidualWeights:
    conv1, conv2 = nn.Conv2d(C, M, 3, padding=1, bias=False), nn.Conv2d(M, C, 3, padding=1, bias=False)
    bn1, bn2 = nn.BatchNorm2d(C), nn.BatchNorm2d(M)
    bn1.running_mean.normal_()
    bn2.running_var.uniform_(0.5, 2)
    for conv in (conv1, conv2):
        conv.out_groups = (M // 4, M // 4, M // 2)
        conv.to(device, dtype, memory_format=torch.channels_last)
    return ResidualWeights.fold(conv1, bn1.to(device), conv2, bn2.to(device))


def test_nothing_of_it_runs_on_a_cpu():
    cpu = torch.device("cpu")
    assert not _cuda.runs_on(cpu)
    assert not _cuda.plans_levels(cpu, 4)
    assert not _cuda.plans_masks(cpu, 4)
    x = torch.zeros(2, 64, 8, 8, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    assert _cuda.choose_fused(x, as_route(torch.tensor([1, 2]), 3, 2), folded()) is None


WRONG = {
    "scale1": lambda t: t.double(),
    "shift1": lambda t: t[1:],
    "bias1": lambda t: torch.stack([t, t], 1)[:, 0],
    "scale2": lambda t: t.to("meta"),
    "conv2": lambda t: t.float() if t.dtype != torch.float32 else t.half(),
    "conv1": lambda t: t.contiguous(),
    "bias2": lambda t: torch.zeros(3),
}


@pytest.mark.parametrize("name", WRONG)
def test_weights_are_looked_at_before_their_addresses_are_taken(name):
    weights = folded(32, 32)
    weights = dataclasses.replace(weights, bias2=torch.zeros(32), direct=None)
    assert len(weights.addresses) == 7
    wrong = dataclasses.replace(weights, **{name: WRONG[name](getattr(weights, name))})
    with pytest.raises((ValueError, TypeError), match=f"dynamic_residual: {name} must be"):
        _ = wrong.addresses


@with_cuda
@no_gpu
def test_errors_of_the_runtime_name_the_call():
    with pytest.raises(RuntimeError, match=r"plan_levels_cuda: cuda.*CUDA error"):
        extension.plan_levels_int64_cuda(0, 2, 1, 4, 2, 3, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"plan_masks_cuda: cuda.*CUDA error"):
        extension.plan_masks_cuda(0, 4, 2, 3, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"fused_residual_cuda: cuda.*CUDA error"):
        extension.fused_residual_cuda(0, SIZES, [0, 16, 32], [0] * 11, True, False, LAYOUT, 0)


@with_cuda
def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"plan_levels_cuda: G must be in 1..255, got 256"):
        extension.plan_levels_int32_cuda(0, 1, 1, 1, 1, 256, 0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"plan_masks_cuda: G must be in 1..32, got 33"):
        extension.plan_masks_cuda(0, 1, 1, 33, 0, 0, 0, 0)


@with_cuda
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("sizes", 8), 3, "stride must be 1 or 2, got 3"),
        (("sizes", 3), 24, "C must be a multiple of 16, got 24"),
        (("sizes", 6), 0, "C_out must be a multiple of 16, at least C, got 0"),
        (("widths", 1), 8, "a width must be a multiple of 16, got 8"),
        (("layout", 0), 4, "output pixels must be at most 64 for each row of warps, got 256"),
        (("layout", 1), 3, "hidden pixels"),
        (("layout", 2), 3, "columns must be 1, 2, 4 or 8, got 3"),
        (("layout", 4), 4, "taps must be 1, 3 or 9, got 4"),
        (("layout", 5), 24, "bytes must be 32 times n, got 24"),
    ],
)
def test_a_problem_that_the_kernel_does_not_take(place, value, message):
    arguments = {"sizes": list(SIZES), "widths": [0, 16, 32], "layout": list(LAYOUT)}
    if message == "hidden pixels":  # 3 rows and their halo of 60 pixels, 8 warps side by side
        arguments["sizes"][2] = arguments["sizes"][5] = 20
        arguments["layout"][3], message = 8, "hidden pixels must be at most 64 for each row of warps, got 100"
    arguments[place[0]][place[1]] = value
    with pytest.raises(ValueError, match=message):
        extension.fused_residual_cuda(
            0, arguments["sizes"], arguments["widths"], [0] * 11, True, False, arguments["layout"], 0
        )


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("B", "N", "G"), [(0, 2, 3), (1, 1, 1), (1024, 20, 3), (65536, 2, 32)])
def test_plans_on_a_gpu(B, N, G):
    levels = torch.randint(-1, G + 2, (B, N))
    for got, expected in zip(plan_levels(levels.cuda(), G), plan_levels(levels.clamp(0, G), G), strict=True):
        assert torch.equal(got.cpu(), expected)
    masks = torch.rand(B, N, G) < 0.5
    for got, expected in zip(plan_masks(masks.cuda()), plan_masks(masks), strict=True):
        assert torch.equal(got.cpu(), expected)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("C", "H"), [(64, 32), (128, 16), (256, 8), (512, 4)])
def test_fused_blocks_on_a_gpu(C, H, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    weights, levels = folded(C, C, dtype, "cuda"), make_levels("uniform", 300, 3)
    x = torch.randn(300, C, H, H, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    route = RoutingPlan.from_levels(levels[:, None].cuda(), 3)[0]
    layout = _cuda.layout_of(x, route, weights)
    assert layout is not None
    got = x.clone()
    _cuda.fused_residual(got, got, route, weights, layout, holds_shortcut=True)
    again = x.clone()
    _cuda.fused_residual(again, again, route, weights, layout, holds_shortcut=True)
    assert torch.equal(got, again)
    assert torch.equal(got[levels == 0], x[levels == 0])
    peer = x.clone()
    peer.add_(masked_branch(x, route, weights))
    wide = dataclasses.replace(weights, conv1=weights.conv1.double(), conv2=weights.conv2.double())
    assert_as_accurate(got, peer, dynamic_residual_reference(x.double(), route, wide))
