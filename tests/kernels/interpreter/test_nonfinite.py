"""Values that are not finite, through the Triton kernels."""

import pytest
import torch
from torch import nn

from den_kernels import DynamicConv2d, ResidualWeights
from den_kernels._geometry import Geometry
from den_kernels._triton import dynamic_conv, norm
from den_kernels._triton.residual import add_branch
from den_kernels.dynamic_norm import dynamic_batch_norm_reference
from den_kernels.dynamic_residual import dynamic_residual_reference
from den_kernels.plan import as_route
from den_kernels.testing import channel_mask

NAN, INF = float("nan"), float("inf")
VALUES = pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
SELECTIONS = pytest.mark.parametrize(
    "selection", [torch.tensor([2, 1, 0]), torch.tensor([[0, 1], [1, 1], [0, 0]]).bool()], ids=["levels", "mask"]
)


def image(C: int, value: float) -> torch.Tensor:
    x = torch.randn(3, C, 5, 6).contiguous(memory_format=torch.channels_last)
    x[0, 1, 2, 3] = x[1, C - 1, 0, 0] = x[2, 0, 4, 5] = value
    return x


def assert_same_kinds(got: torch.Tensor, exact: torch.Tensor) -> None:
    assert torch.equal(got.isnan(), exact.isnan())
    keep = ~exact.isnan()
    torch.testing.assert_close(got[keep].double(), exact[keep].double(), rtol=1e-4, atol=1e-4)


@VALUES
@SELECTIONS
@pytest.mark.parametrize("sizes", [(16, 16), (5, 8)])
def test_convolution(sizes, selection, value):
    C, route = sum(sizes), as_route(selection, 2, 3)
    x, weight = image(C, value), torch.randn(C, C, 3, 3)
    got = dynamic_conv.forward(x, weight, None, route, Geometry((1, 1), (1, 1), (1, 1), 1, sizes, sizes))
    used = channel_mask(selection, sizes)[:, :, None, None]
    exact = nn.functional.conv2d(torch.where(used, x, 0).double(), weight.double(), padding=1)
    assert_same_kinds(got, torch.where(used, exact, 0))


@VALUES
@SELECTIONS
@pytest.mark.parametrize("post", [False, True])
def test_residual_block(post, selection, value):
    conv1, conv2 = DynamicConv2d(16, 32, 3, padding=1, out_groups=2), nn.Conv2d(32, 16, 3, padding=1)
    parts = conv1, nn.BatchNorm2d(32 if post else 16).eval(), conv2, nn.BatchNorm2d(16 if post else 32).eval()
    weights = ResidualWeights.fold(*parts, post_activation=post)
    x, route = image(16, value), as_route(selection, 2, 3)
    out = x.clone()
    add_branch(x, out, route, weights)
    exact = dynamic_residual_reference(
        x.double(), route, ResidualWeights.fold(*(p.double() for p in parts), post_activation=post)
    )
    used = route.levels > 0  # on a GPU the ReLU leaves an instance at level 0 alone
    assert_same_kinds(out[used], exact[used])


@VALUES
@SELECTIONS
@pytest.mark.parametrize("relu", [False, True])
def test_batch_norm_in_eval_mode_and_its_gradients(relu, selection, value):
    sizes, x, dy = (8, 8), image(16, value), torch.randn(3, 16, 5, 6)
    weight, bias, running = torch.rand(16) + 0.5, torch.randn(16), (torch.zeros(16), torch.ones(16))
    statistics, used = torch.stack([*running, torch.ones(16)]), as_route(selection, 2, 3).selection()
    y, _ = norm.forward(x, used, statistics, weight, bias, sizes, 1e-5, relu)
    dx, sums = norm.backward(dy, x, used, statistics, weight, bias, sizes, 1e-5, relu, False, True, True)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact = dynamic_batch_norm_reference(leaves[0], selection, *leaves[1:], *running, groups=sizes, relu=relu)
    for got, want in zip(
        (y, dx, sums[1], sums[0]), (exact, *torch.autograd.grad(exact, leaves, dy.double())), strict=True
    ):
        assert_same_kinds(got, want.detach())
