"""One image whose batch has an odd stride, as reshaping may leave it: no result depends on where no image lies.

PyTorch's own gradient of grouped weights does (2.13, without oneDNN): on a CPU without AVX-512, training in bfloat16
with one image at a level got wrong gradients.
"""

import pytest
import torch
from torch import Tensor

from den_kernels import dynamic_conv2d
from den_kernels.testing import masked_conv2d
from tests.call_kinds import INFERENCE, LEVELS, MODULES, PLANS, images, module

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.channels_last, torch.contiguous_format]


def odd(x: Tensor) -> Tensor:  # [1, C, H, W] -> the same
    return x.as_strided(x.shape, (x.shape[1], *x.stride()[1:]))


def results(call, x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """The output of a call, and the gradients of x and the parameters."""
    x = x.requires_grad_()
    y = call(x)
    dy = torch.randint(-1, 2, y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", sorted(set(MODULES) - PLANS))
def test_every_op(name, layout):
    called = module(name)
    x, level = images()[2:3].contiguous(memory_format=layout), LEVELS[2:3]
    if name in INFERENCE:
        with torch.no_grad():
            assert torch.equal(called(odd(x), level), called(x, level))
        return
    parameters = list(called.parameters())
    for got, expected in zip(*(results(lambda x: called(x, level), x, parameters) for x in (odd(x), x)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 4, 8, 32])
@pytest.mark.parametrize("levels", [[4], [2], [4, 2, 3, 1]], ids=str)  # of the last each image is alone at its level
def test_gradients_of_grouped_convolutions(levels, groups, dtype, layout):
    generator = torch.Generator().manual_seed(0)
    settings = {"padding": 1, "groups": groups, "in_groups": (8,) * 4, "out_groups": (8,) * 4}
    shapes = (len(levels), 32, 5, 5), (32, 32 // groups, 3, 3)
    made = (torch.randint(-1, 2, s, generator=generator) for s in shapes)  # sums of such products are exact
    x, weight = (t.to(dtype).contiguous(memory_format=layout) for t in made)

    def run(op, convert) -> list[Tensor]:
        w = convert(weight).requires_grad_()
        return results(lambda x: op(x, w, None, torch.tensor(levels), **settings), convert(x), [w])

    got = run(dynamic_conv2d, lambda t: odd(t) if len(t) == 1 else t.clone())
    exact = run(masked_conv2d, lambda t: t.double().contiguous().clone(memory_format=torch.contiguous_format))
    for name, of_ours, right in zip(("y", "dx", "dweight"), got, exact, strict=True):
        assert torch.equal(of_ours.double(), right), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_inside_torch_func(dtype):
    generator = torch.Generator().manual_seed(0)
    settings = {"padding": 1, "groups": 4, "in_groups": (8,) * 4, "out_groups": (8,) * 4}
    made = [torch.randint(-1, 2, s, generator=generator) for s in ((1, 32, 5, 5), (32, 8, 3, 3), (1, 32, 5, 5))]
    x, weight, dy = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in made)

    def dweight(op, convert) -> Tensor:
        _, gradients = torch.func.vjp(
            lambda w: op(convert(x), w, None, torch.tensor([3]), **settings), weight.to(convert(x).dtype)
        )
        return gradients(dy.to(convert(x).dtype))[0]

    right = dweight(masked_conv2d, lambda t: t.double().clone(memory_format=torch.contiguous_format))
    assert torch.equal(dweight(dynamic_conv2d, odd).double(), right)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_gradients(dtype, layout):
    generator = torch.Generator().manual_seed(0)
    settings = {"padding": 1, "groups": 4, "in_groups": (8,) * 4, "out_groups": (8,) * 4}
    shapes = (1, 32, 5, 5), (32, 8, 3, 3), (1, 32, 5, 5), (1, 32, 5, 5), (32, 8, 3, 3)
    made = [torch.randint(-1, 2, s, generator=generator) for s in shapes]

    def second(op, convert) -> tuple[Tensor, ...]:
        """Of the gradients of x and weight, in the directions of the last two tensors: those of x, weight and dy."""
        x, weight, dy, *directions = map(convert, made)
        leaves = [t.requires_grad_() for t in (x, weight, dy)]
        y = op(x, weight, None, torch.tensor([3]), **settings)
        gradients = torch.autograd.grad(y, leaves[:2], dy, create_graph=True)
        return torch.autograd.grad(gradients, leaves, directions)

    def ours(t: Tensor) -> Tensor:
        t = t.to(dtype).contiguous(memory_format=layout)
        return odd(t) if len(t) == 1 else t

    got = second(dynamic_conv2d, ours)
    exact = second(masked_conv2d, lambda t: t.double())
    for name, of_ours, right in zip(("x", "weight", "dy"), got, exact, strict=True):
        assert torch.equal(of_ours.double(), right), name
