"""The Triton convolution and its gradients against the reference, as accurate as PyTorch in the same dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from den_kernels._geometry import Geometry
from den_kernels._triton import dynamic_conv as kernels
from den_kernels._triton.convolve import convolve
from den_kernels.dynamic_conv import dynamic_conv2d_reference
from den_kernels.plan import as_route
from den_kernels.testing import LAYOUTS, LEVEL_KINDS, ConvCase, assert_as_accurate, masked_conv2d
from tests.release import always

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
SIZES = (16, 16, 32)  # groups that tiles follow
ODD = (13, 27)  # groups that end inside tiles
CASES = {
    "out": ConvCase(channels=(24, 1), out_sizes=SIZES),
    "in": ConvCase(channels=(1, 24), in_sizes=SIZES, out_sizes=()),
    "both": ConvCase(in_sizes=SIZES, out_sizes=SIZES, stride=2),
    "odd out": ConvCase(batch=3, channels=(7, 1), out_sizes=ODD, stride=(2, 1), dilation=(1, 2)),
    "odd in": ConvCase(
        batch=3, channels=(1, 5), in_sizes=ODD, out_sizes=(), kernel=(5, 5), stride=(3, 2), padding=(2, 0),
        dilation=(2, 1),
    ),
    "1x1": ConvCase(batch=3, kernel=(1, 1), padding=0, in_sizes=(32, 32), out_sizes=(64, 64)),
    "one pixel": ConvCase(batch=5, size=(1, 1), kernel=(1, 1), padding=0, channels=(24, 1), out_sizes=(16, 32)),
    "7x7": ConvCase(batch=2, kernel=(7, 7), padding=3, size=(8, 8), channels=(3, 1), out_sizes=(16, 16), stride=2),
    "dilated stride": ConvCase(batch=2, channels=(16, 1), out_sizes=(16, 16), stride=2, dilation=2, padding=2),
    "mask": ConvCase(batch=4, in_sizes=SIZES, out_sizes=SIZES, selection="mask"),
    "mask of outputs": ConvCase(batch=4, channels=(20, 1), out_sizes=(32, 32), selection="mask", stride=2),
    "odd mask": ConvCase(batch=4, in_sizes=ODD, out_sizes=(11, 2), selection="mask"),
    "cardinality": ConvCase(batch=3, cardinality=4, in_sizes=SIZES, out_sizes=(32, 32, 64)),
    "cardinality of outputs": ConvCase(batch=3, cardinality=8, channels=(32, 1), out_sizes=(16, 48), stride=2),
    "cardinality of inputs": ConvCase(batch=3, cardinality=8, channels=(1, 32), in_sizes=(16, 48), out_sizes=()),
    "cardinality, mask": ConvCase(batch=3, cardinality=4, in_sizes=(4, 12), out_sizes=(16, 48), selection="mask"),
    "depthwise": ConvCase(batch=3, cardinality=40, in_sizes=(8, 32), out_sizes=(8, 32)),
    "depthwise, mask": ConvCase(batch=3, cardinality=24, in_sizes=(13, 11), out_sizes=(13, 11), selection="mask"),
    "nobody": ConvCase(batch=3, in_sizes=(16, 16), out_sizes=(), channels=(1, 20), selection="zero"),
    "one instance more than a tile": ConvCase(batch=3, size=(8, 8), out_sizes=(16, 16), selection="top"),
    "last only": ConvCase(batch=3, out_sizes=(16, 16), in_sizes=(16, 16), selection="last only", bias=False),
    "no instance": ConvCase(batch=0, out_sizes=(16, 16)),
}  # fmt: skip


def geometry_of(case: ConvCase) -> Geometry:
    pair = lambda value: (value, value) if isinstance(value, int) else value  # noqa: E731
    return Geometry(
        pair(case.stride), pair(case.padding), pair(case.dilation), case.cardinality,
        case.out_sizes, case.in_sizes,
    )  # fmt: skip


def seed_of(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of an output."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)


def expected(case: ConvCase, dtype: torch.dtype, of=lambda t: t):
    """What PyTorch makes of the masked dense convolution: output, and gradients of x, weight and bias."""
    x, weight, bias, selection = case.tensors(dtype)
    leaves = [None if t is None else of(t).requires_grad_() for t in (x, weight, bias)]
    y = masked_conv2d(*leaves, selection, **case.keywords)
    gradients = torch.autograd.grad(y, [t for t in leaves if t is not None], of(seed_of(y.shape, dtype)))
    return y.detach(), *gradients


def check(case: ConvCase, dtype: torch.dtype) -> None:
    """Output and gradients err at most twice as much as PyTorch's, and channels out of use are exactly zero."""
    x, weight, bias, selection = case.tensors(dtype)
    geometry = geometry_of(case)
    route = as_route(selection, len(case.out_sizes) or len(case.in_sizes), case.batch)
    y = kernels.forward(x, weight, bias, route, geometry)
    assert y.numel() == 0 or y.stride() == torch.nn.functional.conv2d(x, weight, bias, *geometry[:4]).stride()
    gradients = kernels.backward(seed_of(y.shape, dtype), x, weight, route, geometry, (True, True, bias is not None))
    got = [y, *(gradient for gradient in gradients if gradient is not None)]
    wanted = (expected(case, dtype), expected(case, torch.float64), expected(case, torch.float64, torch.abs))
    for ours, peer, exact, scale in zip(got, *wanted, strict=True):
        assert_as_accurate(ours, peer, exact, scale)


OFTEN = [name for name in CASES if name not in ("both", "odd in", "mask", "depthwise, mask")]  # which take long


@pytest.mark.parametrize("name", always(CASES, *OFTEN))
def test_float32(name):
    check(CASES[name], torch.float32)


@pytest.mark.parametrize("dtype", [BFLOAT16, pytest.param(FLOAT16, marks=pytest.mark.release)], ids=str)
@pytest.mark.parametrize(
    "name", always(["out", "both", "odd in", "mask", "cardinality", "odd mask"], "both", "odd in", "odd mask")
)
def test_half_precision(name, dtype):
    check(CASES[name], dtype)


@settings(max_examples=15)
@given(
    st.sampled_from([*LEVEL_KINDS, "mask"]), st.sampled_from(["out", "in", "both"]), st.sampled_from(LAYOUTS),
    st.sampled_from([(16, 16), (5, 9, 3), (32, 16)]), st.integers(1, 2), st.sampled_from([1, 3]), st.integers(0, 99),
)  # fmt: skip
def test_any_selection_and_layout(selection, side, layout, sizes, stride, kernel, seed):
    case = ConvCase(
        batch=3, size=(6, 5), kernel=(kernel, kernel), stride=stride, selection=selection, layout=layout, seed=seed,
        channels=(6, 10), in_sizes=sizes if side != "out" else (), out_sizes=sizes if side != "in" else (),
    )  # fmt: skip
    check(case, torch.float32)


def test_gradients_that_nobody_wants_are_not_computed():
    case = CASES["out"]
    x, weight, _, selection = case.tensors(torch.float32)
    route = as_route(selection, 3, case.batch)
    grad = torch.randn(5, 64, 9, 7)
    assert kernels.backward(grad, x, weight, route, geometry_of(case), (False,) * 3) == (None, None, None)
    dx, dweight, dbias = kernels.backward(grad, x, weight, route, geometry_of(case), (False, True, False))
    assert dx is None
    assert dbias is None
    assert dweight.shape == weight.shape


def test_nan_in_an_image_passes_through_that_image_alone():
    case = ConvCase(channels=(8, 1), out_sizes=(16, 16), selection="top")
    x, weight, bias, selection = case.tensors(torch.float32)
    x[1] = float("nan")
    y = kernels.forward(x, weight, bias, as_route(selection, 2, 5), geometry_of(case))
    assert y[1].isnan().all()
    assert not y[[0, 2, 3, 4]].isnan().any()


def test_gradients_of_outputs_out_of_use_are_not_read():
    case = ConvCase(channels=(8, 1), out_sizes=(16, 16), selection="uniform")
    x, weight, bias, selection = case.tensors(torch.float32)
    route, geometry = as_route(selection, 2, 5), geometry_of(case)
    y = dynamic_conv2d_reference(x, weight, bias, route, padding=1, out_groups=(16, 16))
    grad = torch.randn_like(y)
    unread = ~(selection[:, None] > torch.tensor([0] * 16 + [1] * 16))[:, :, None, None]
    with_nan = kernels.backward(torch.where(unread, float("nan"), grad), x, weight, route, geometry, (True,) * 3)
    for got, clean in zip(with_nan, kernels.backward(grad, x, weight, route, geometry, (True,) * 3), strict=True):
        assert torch.equal(got, clean)


def test_elements_are_counted_in_64_bits():
    """Instances 2**30 elements apart, so that the third begins at 2**31; of the memory between nothing is touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    buffer = torch.empty(2**31 + 512, dtype=torch.bfloat16)
    x = buffer.as_strided((3, 16, 4, 4), (2**30, 1, 64, 16)).normal_()
    weight = torch.randn(32, 16, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    route, geometry = as_route(torch.tensor([1, 2, 2]), 2, 3), Geometry((1, 1), (1, 1), (1, 1), 1, (16, 16), ())
    near = x.clone(memory_format=torch.channels_last)
    assert torch.equal(
        kernels.forward(x, weight, None, route, geometry), kernels.forward(near, weight, None, route, geometry)
    )
    grad = torch.randn(3, 32, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last)
    far, close = (
        kernels.backward(grad, source, weight, route, geometry, (False, True, False))[1] for source in (x, near)
    )
    assert torch.equal(far, close)


def test_more_pixels_than_32_bits_count_are_refused():
    x = torch.empty(1, 1, 1, 1).expand(2**11, 16, 2**10, 2**10)
    out = torch.empty(1, 1, 1, 1).expand(2**11, 16, 2**10, 2**10)
    route, geometry = (
        as_route(torch.ones(2**11, dtype=torch.int32), 1, 2**11),
        Geometry((1, 1), (0, 0), (1, 1), 1, (16,), ()),
    )
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 pixels, got \[2048, 16, 1024, 1024\]"):
        convolve(x, torch.empty(16, 16, 1, 1), out, route, geometry)
