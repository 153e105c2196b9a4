"""The convolution on boxes, which Hopper and later run: values and gradients against the reference."""

import pytest
import torch

from den_kernels._geometry import Geometry
from den_kernels._triton import convolve, dynamic_conv, residual
from den_kernels._triton.launch import Launch
from den_kernels.dynamic_conv import dynamic_conv2d_reference
from den_kernels.plan import as_route
from den_kernels.rows import pool_rows
from tests.kernels.interpreter.test_residual import fold, random_block
from tests.on_gpu import close_by_instance


@pytest.fixture
def kernels(monkeypatch) -> list[str]:
    """The kernels that run on a Hopper GPU of two multiprocessors."""
    seen: list[str] = []
    run = Launch.run
    monkeypatch.setattr(convolve, "architecture", lambda device: (90, 2))
    monkeypatch.setattr(Launch, "run", lambda self, like: seen.append(self.kernel.fn.__name__) or run(self, like))
    return seen


def data(B: int, C: int, N: int, size: tuple[int, int], dtype: torch.dtype, kernel: int = 3):
    torch.manual_seed(0)
    x = torch.randn(B, C, *size).to(dtype).contiguous(memory_format=torch.channels_last)
    w = (torch.randn(N, C, kernel, kernel) / 8).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, w


@pytest.mark.parametrize(
    ("sides", "size", "kernel", "dilation", "dtype"),
    [
        (((16, 16, 32), ()), (8, 8), 3, 1, torch.bfloat16),
        (((), (16, 16, 32)), (4, 16), 3, 2, torch.float16),
        (((64, 64), (16, 16)), (4, 32), 1, 1, torch.bfloat16),
    ],
    ids=["out", "in", "both"],
)
def test_forward_and_gradients(kernels, sides, size, kernel, dilation, dtype):
    groups = len(sides[0] or sides[1])
    C, N = sum(sides[1]) or 16, sum(sides[0]) or 16
    levels = torch.tensor([1, groups, 0])
    x, weight = data(3, C, N, size, dtype, kernel)
    route = as_route(levels, groups, 3)
    pad = kernel // 2 * dilation
    geometry = Geometry((1, 1), (pad, pad), (dilation, dilation), 1, *sides)
    y = dynamic_conv.forward(x, weight, None, route, geometry)
    dy = torch.randn_like(y)
    dx, *_ = dynamic_conv.backward(dy, x, weight, route, geometry, (True, True, False))
    assert kernels == ["box_kernel", "box_kernel", "weight_gradient_kernel"]
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    right = dynamic_conv2d_reference(
        *leaves, None, route, padding=pad, dilation=dilation, out_groups=sides[0], in_groups=sides[1]
    )
    right.backward(dy.double())
    for got, wanted in ((y, right.detach()), (dx, leaves[0].grad)):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=2e-2)
    assert not y.isnan().any()


@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_with_all_that_is_behind_the_sums(kernels, stride, monkeypatch):
    """Hidden channels that nobody wrote (NaN) are not read; shortcut and second output as on pointers."""
    block = random_block(16, 64, 16 * stride, (16, 16, 32), stride)
    weights, route = fold(block, torch.bfloat16), as_route(torch.tensor([3, 0, 1]), 3, 3)
    x, _ = data(3, 16, 16, (8 * stride, 8 * stride), torch.bfloat16)
    out = pool_rows(x, 16 * stride, stride).fill_(torch.nan)
    after = residual.Next(torch.rand(16 * stride), torch.randn(16 * stride), torch.tensor([0, 2, 1]).int())
    activated = residual.add_branch(x, out, route, weights, following=after, holds_shortcut=False)
    assert kernels == ["activate_kernel", "convolve_kernel" if stride == 2 else "box_kernel", "box_kernel"]
    monkeypatch.setattr(convolve, "architecture", lambda device: (80, 2))
    other = torch.empty_like(out)
    wanted = residual.add_branch(x, other, route, weights, following=after, holds_shortcut=False)
    close_by_instance(out, other.double(), 1.5e-2)
    used = after.levels > 0
    close_by_instance(activated[used], wanted[used].double(), 2e-2)
    assert torch.equal(out[1], other[1])
    assert activated[0].isnan().all()
