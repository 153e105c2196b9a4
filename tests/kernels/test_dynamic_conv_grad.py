"""dynamic_conv2d backward: gradcheck, the reference's gradients, gradient skipping, compile, export, opcheck."""

import os
import subprocess
import sys
from ctypes.util import find_library

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from den_kernels._conv_masked import masked_backward
from den_kernels._geometry import Geometry, memory_format_of
from den_kernels.dynamic_conv import dynamic_conv2d
from den_kernels.plan import Route, RoutingPlan, as_route
from den_kernels.testing import LAYOUTS, LEVEL_KINDS, ConvCase, assert_as_accurate, channel_mask, masked_conv2d
from tests.fuzz import examples

CASES = {
    "out": ConvCase(batch=4, size=(4, 5), channels=(3, 1), out_sizes=(1, 2)),
    "in": ConvCase(batch=4, size=(4, 5), stride=2, in_sizes=(2, 1, 1), out_sizes=(), channels=(1, 3)),
    "both": ConvCase(batch=4, size=(5, 3), dilation=2, padding=2, in_sizes=(1, 2), out_sizes=(2, 1)),
    "mask": ConvCase(batch=6, size=(3, 3), in_sizes=(1, 2, 1), out_sizes=(2, 1, 2), selection="mask"),
    "zero": ConvCase(batch=3, size=(3, 3), out_sizes=(1, 2), selection="zero"),
    "in_zero": ConvCase(batch=3, size=(3, 3), in_sizes=(1, 2), out_sizes=(), selection="zero", channels=(1, 2)),
    "top": ConvCase(batch=3, size=(3, 3), channels=(2, 1), out_sizes=(1, 2), selection="top", layout="contiguous"),
    "same": ConvCase(batch=3, size=(4, 3), kernel=(2, 4), padding="same", channels=(2, 1), out_sizes=(1, 2)),
    "one_tap": ConvCase(batch=4, size=(5, 4), kernel=(1, 1), stride=2, padding=0, in_sizes=(1, 2), out_sizes=(2, 1)),
    "no_bias": ConvCase(batch=3, size=(3, 3), channels=(2, 1), out_sizes=(1, 2), bias=False),
    "depthwise": ConvCase(batch=4, size=(4, 4), cardinality=5, in_sizes=(2, 3), out_sizes=(2, 3)),
    "grouped_in": ConvCase(batch=4, size=(4, 4), cardinality=2, in_sizes=(2, 2), out_sizes=(), channels=(4, 6)),
    "grouped_out": ConvCase(
        batch=4, size=(4, 4), cardinality=4, channels=(4, 1), out_sizes=(2, 4, 2), selection="mask"
    ),
}


def leaves(case: ConvCase, dtype: torch.dtype):
    x, weight, bias, selection = case.tensors(dtype)
    return [None if t is None else t.requires_grad_() for t in (x, weight, bias)], selection


def gradients(case: ConvCase, function, dtype: torch.dtype, of=lambda t: t):
    """Gradients of x, weight and bias for a seeded output gradient; `of` is applied to every argument."""
    x, weight, bias, selection = case.tensors(dtype)
    tensors = [None if t is None else of(t).requires_grad_() for t in (x, weight, bias)]
    y = function(*tensors, selection)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
    return torch.autograd.grad(y, [t for t in tensors if t is not None], of(seed))


def check_gradients(case: ConvCase, dtype: torch.dtype) -> None:
    """Each gradient errs at most twice as much as PyTorch's of the masked dense convolution."""
    ours = gradients(case, lambda *a: dynamic_conv2d(*a, **case.keywords), dtype)
    peers = gradients(case, lambda *a: masked_conv2d(*a, **case.keywords), dtype)
    exact = gradients(case, lambda *a: masked_conv2d(*a, **case.keywords), torch.float64)
    scales = gradients(case, lambda *a: masked_conv2d(*a, **case.keywords), torch.float64, torch.abs)
    for got, peer, truth, scale in zip(ours, peers, exact, scales, strict=True):
        assert_as_accurate(got, peer, truth, scale)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    """Numeric derivatives of the reference (the forward in float64) against the backward of the segments."""
    case = CASES[name]
    tensors, selection = leaves(case, torch.float64)
    unread = tensors[0].isnan()

    def call(x, weight, bias):
        return dynamic_conv2d(x.masked_fill(unread, float("nan")), weight, bias, selection, **case.keywords)

    with torch.no_grad():
        tensors[0].nan_to_num_()
    assert torch.autograd.gradcheck(call, tensors, fast_mode=False)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_as_accurate_as_pytorch(name, dtype):
    check_gradients(CASES[name], dtype)


@examples(40)
@given(
    st.sampled_from([1, 2, 17]), st.sampled_from([*LEVEL_KINDS, "mask"]), st.sampled_from(["out", "in", "both"]),
    st.sampled_from(LAYOUTS), st.booleans(), st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
def test_gradients_of_any_selection_and_layout(batch, selection, side, layout, weight_channels_last, stride, seed):
    case = ConvCase(
        batch=batch, stride=stride, selection=selection, layout=layout, weight_channels_last=weight_channels_last,
        in_sizes=(5, 1, 3) if side != "out" else (), out_sizes=(2, 7, 4) if side != "in" else (), seed=seed,
    )  # fmt: skip
    check_gradients(case, torch.float32)


@pytest.mark.parametrize("selection", ["top", "mask", "uniform"])
def test_gradients_of_wide_maps(selection):
    """Widths at which a pixel of the direct convolution's maps takes more than its channels."""
    case = ConvCase(batch=5, size=(5, 6), selection=selection, in_sizes=(64, 128, 64), out_sizes=(32, 80, 16))
    check_gradients(case, torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_masked_composition_has_the_same_gradients(name):
    """What runs on devices without kernels, run here."""
    case = CASES[name]
    if isinstance(case.padding, str):
        case = ConvCase(**{**case.__dict__, "padding": 1})
    tensors, selection = leaves(case, torch.float64)
    y = dynamic_conv2d(*tensors, selection, **case.keywords)
    grad = torch.randn_like(y)
    wanted = [t is not None for t in tensors]
    ours = torch.autograd.grad(y, [t for t in tensors if t is not None], grad)
    pair = lambda v: (v, v)  # noqa: E731
    geometry = Geometry(
        pair(case.stride), pair(case.padding), pair(case.dilation), case.cardinality,
        case.out_sizes, case.in_sizes,
    )  # fmt: skip
    route = as_route(selection, len(case.out_sizes) or len(case.in_sizes), case.batch)
    x, weight, _ = (None if t is None else t.detach() for t in tensors)
    masked = masked_backward(grad, x, weight, route, geometry, wanted)
    for got, expected in zip([m for m in masked if m is not None], ours, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_unread_channels_get_no_gradient():
    case = ConvCase(batch=9, in_sizes=(2, 3, 4), out_sizes=())
    tensors, levels = leaves(case, torch.float32)
    dynamic_conv2d(*tensors, levels, **case.keywords).square().sum().backward()
    used = channel_mask(levels, case.in_sizes)
    assert (tensors[0].grad[~used] == 0).all()
    assert tensors[0].grad[used].ne(0).any()


def test_gradients_keep_the_memory_format_of_their_tensor():
    for layout in ("contiguous", "channels_last", "channels_last slice"):
        tensors, levels = leaves(ConvCase(layout=layout), torch.float32)
        y = dynamic_conv2d(*tensors, levels, padding=1, out_groups=(3, 5, 4))
        for t, gradient in zip(tensors[:2], torch.autograd.grad(y.sum(), tensors[:2]), strict=True):
            assert gradient.is_contiguous(memory_format=memory_format_of(t))


class BackwardMasks(TorchDispatchMode):
    """Records which gradients the backward op is asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.den_kernels.dynamic_conv2d_backward.default:
            self.asked.append(tuple(args[-1]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_that_nobody_needs_are_not_computed(wanted):
    x, weight, bias, levels = ConvCase().tensors(torch.float32)
    tensors = [t.requires_grad_(needed) for t, needed in zip((x, weight, bias), wanted, strict=True)]
    with BackwardMasks() as seen:
        dynamic_conv2d(*tensors, levels, padding=1, out_groups=(3, 5, 4)).sum().backward()
    assert seen.asked == [wanted]
    assert tuple(t.grad is not None for t in tensors) == wanted


def test_two_backward_runs_are_bit_equal():
    case = ConvCase(batch=17, selection="mask", in_sizes=(2, 3, 4))
    runs = [gradients(case, lambda *a: dynamic_conv2d(*a, **case.keywords), torch.float32) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast_gives_gradients_in_the_dtype_of_the_parameters():
    tensors, levels = leaves(ConvCase(), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = dynamic_conv2d(*tensors, levels, padding=1, out_groups=(3, 5, 4))
    y.float().square().sum().backward()
    assert [t.grad.dtype for t in tensors] == [torch.float32] * 3
    assert all(t.grad.isfinite().all() for t in tensors)


@pytest.mark.parametrize("name", ["out", "in", "mask", "no_bias", "depthwise"])
def test_opcheck(name):
    case = CASES[name]
    tensors, selection = leaves(case, torch.float32)
    with torch.no_grad():
        tensors[0].nan_to_num_()
    route = as_route(selection, len(case.out_sizes) or len(case.in_sizes), case.batch)
    geometry = Geometry(
        (case.stride,) * 2, (case.padding,) * 2, (case.dilation,) * 2, case.cardinality,
        case.out_sizes, case.in_sizes,
    )  # fmt: skip
    routing = route.levels, route.order, route.offsets, route.mask
    torch.library.opcheck(torch.ops.den_kernels.dynamic_conv2d.default, (*tensors, *routing, *geometry))
    x, weight, _ = (None if t is None else t.detach() for t in tensors)
    grad = torch.randn(geometry.out_shape(x, weight))
    for mask in ([True, True, True], [False, True, False]):
        arguments = (grad, x, weight, *routing, *geometry, mask)
        torch.library.opcheck(torch.ops.den_kernels.dynamic_conv2d_backward.default, arguments)


class TwoConvs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(6, 4, 3, 3))
        self.b = torch.nn.Parameter(torch.randn(4, 6, 3, 3))

    def forward(self, x, selection: Route | torch.Tensor):
        hidden = dynamic_conv2d(x, self.a, None, selection, padding=1, out_groups=(2, 4)).relu()
        return x + dynamic_conv2d(hidden, self.b, None, selection, padding="same", in_groups=(2, 4))


@pytest.mark.parametrize("kind", ["levels", "mask", "route"])
def test_compile_fullgraph_forward_and_backward(kind):
    net, x = TwoConvs(), torch.randn(5, 4, 6, 6, requires_grad=True)
    levels = torch.tensor([2, 0, 1, 2, 1])
    selection = {
        "levels": levels, "mask": levels[:, None] > torch.arange(2),
        "route": RoutingPlan.from_levels(levels[:, None])[0],
    }[kind]  # fmt: skip
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    results = []
    for function in (net, compiled):
        y = function(x, selection)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-6)


def test_compile_under_autocast():
    net, x, levels = TwoConvs(), torch.randn(3, 4, 6, 6), torch.tensor([2, 0, 1])
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(compiled(x, levels), net(x, levels))


def test_export():
    net, x, levels = TwoConvs(), torch.randn(5, 4, 6, 6), torch.tensor([2, 0, 1, 2, 1])
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(net, (x, levels), dynamic_shapes=({0: batch}, {0: batch}))
    other, other_levels = torch.randn(3, 4, 6, 6), torch.tensor([1, 2, 0])
    torch.testing.assert_close(program.module()(other, other_levels), net(other, other_levels))


STRIDED = """
import torch
from den_kernels import dynamic_conv2d
SHAPES = ((7, 15, 4, 23, (2, 1)), (12, 32, 4, 17, (2, 1)), (8, 16, 9, 9, (3, 1)), (2, 3, 3, 18, (1, 2)),
          (7, 20, 6, 7, (2, 1)), (8, 33, 8, 22, (2, 2)), (5, 7, 8, 22, (2, 2)))
for C_in, C_out, H, W, stride in SHAPES:
    x = torch.randn(3, C_in, H, W).to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(C_out, C_in, 1, 1).bfloat16().requires_grad_()
    for _ in range(30):
        y = dynamic_conv2d(x, weight, None, torch.tensor([1, 0, 1]), stride=stride, out_groups=(C_out,))
        torch.autograd.grad(y, (x, weight), torch.ones_like(y))
print("whole")
"""


@pytest.mark.skipif("san.so" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer checks the heap itself")
@pytest.mark.skipif(find_library("c_malloc_debug") is None, reason="the C library has no checks of its heap")
def test_strided_kernels_of_one_tap_write_nowhere_else():
    """oneDNN does, for bfloat16 weights of fewer than 16 input channels: the heap is checked at every allocation."""
    checked = {"LD_PRELOAD": find_library("c_malloc_debug"), "MALLOC_CHECK_": "3", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **checked}
    done = subprocess.run([sys.executable, "-c", STRIDED], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr[-2000:]
