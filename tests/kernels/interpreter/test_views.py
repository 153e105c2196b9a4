"""Weights, biases and scales that are views: the kernels know the strides of activations alone."""

import pytest
import torch

from den_kernels import ResidualWeights
from den_kernels._geometry import Geometry
from den_kernels._triton import dynamic_conv as kernels
from den_kernels._triton.residual import add_branch
from den_kernels.plan import as_route
from tests.release import always

GROUPS = (16, 16)
ROUTE = as_route(torch.tensor([2, 1, 0]), 2, 3)


def last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def memory(*shape: int) -> torch.Tensor:
    return last(torch.full(shape, torch.nan))


# A weight [O, I, R, S] as a view of larger memory, of NaN, or of memory in another order.
VIEWS = {
    "inputs of a wider one": lambda w: memory(w.shape[0], w.shape[1] + 16, 3, 3)[:, 16:].copy_(w),
    "first inputs of a wider one": lambda w: memory(w.shape[0], w.shape[1] + 16, 3, 3)[:, :-16].copy_(w),
    "crop of the taps": lambda w: memory(*w.shape[:2], 5, 5)[:, :, 1:4, 1:4].copy_(w),
    "every other output": lambda w: memory(2 * w.shape[0], *w.shape[1:])[::2].copy_(w),
    "off a boundary": lambda w: last(
        torch.full((w.numel() + 1,), torch.nan)[1:].view(w.shape[0], 3, 3, w.shape[1]).permute(0, 3, 1, 2).copy_(w)
    ),
    "one kernel for all": lambda w: last(w[:1]).expand(w.shape),
}


def every_other(v: torch.Tensor) -> torch.Tensor:
    return torch.full((2 * v.shape[0],), torch.nan)[::2].copy_(v)


@pytest.mark.parametrize("view", always(VIEWS, "crop of the taps", "off a boundary"))
def test_convolution_and_its_gradients(view):
    x, bias = last(torch.randn(3, 16, 6, 5)), torch.randn(32)
    weight = VIEWS[view](torch.randn(32, 16, 3, 3))
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1, GROUPS, ())
    grad = torch.randn(3, 32, 6, 5)
    made = []
    for w, b in ((weight.clone(memory_format=torch.channels_last), bias), (weight, every_other(bias))):
        gradients = kernels.backward(grad, x, w, ROUTE, geometry, (True, True, True))
        made.append((kernels.forward(x, w, b, ROUTE, geometry), *gradients))
    for got, want in zip(*made, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("view", VIEWS)
def test_residual_block(view):
    x, vectors = last(torch.randn(3, 16, 6, 5)), [torch.rand(n) + 0.5 for n in (16, 16, 32, 32, 16)]
    conv1, conv2 = (VIEWS[view](torch.randn(*shape, 3, 3) / 12) for shape in ((32, 16), (16, 32)))
    made = []
    for change, of in ((last, torch.clone), (lambda w: w, every_other)):
        scale1, shift1, scale2, bias1, bias2 = map(of, vectors)
        weights = ResidualWeights(
            *(scale1, shift1, change(conv1.clone() if change is last else conv1), scale2, bias1),
            *(change(conv2.clone() if change is last else conv2), bias2, GROUPS, torch.arange(32) // 16, 1),
        )
        out = x.clone()
        add_branch(x, out, ROUTE, weights)
        made.append(out)
    assert torch.equal(*made)
    assert made[0].isfinite().all()
