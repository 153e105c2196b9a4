"""The gradients of the direct dynamic convolution, float32 and bfloat16: accuracy, what is not finite, threads."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from den_kernels import RoutingPlan, _conv_direct
from den_kernels._extension import extension
from den_kernels.dynamic_conv import dynamic_conv2d
from den_kernels.testing import assert_as_accurate, masked_conv2d, poison_unread
from tests.fuzz import examples
from tests.kernels.test_conv_direct import (
    DTYPES,
    FACTOR,
    GEOMETRY,
    SELECTIONS,
    by_onednn,
    channels_last,
    parts,
    runs,
    select,
)


@DTYPES
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["levels", "mask"])
@pytest.mark.parametrize("elastic", [("out_groups",), ("in_groups",), ("out_groups", "in_groups")], ids="-".join)
def test_gradients_are_as_accurate_as_onednn(elastic, kind, stride, dtype):
    torch.manual_seed(0)
    x, weight = channels_last(torch.randn(6, 32, 9, 9)).to(dtype), torch.randn(48, 32, 3, 3).to(dtype)
    grad = channels_last(torch.randn(6, 48, -(-9 // stride), -(-9 // stride))).to(dtype)
    sizes = {"out_groups": (5, 12, 31), "in_groups": (20, 7, 5)}
    keywords = {"padding": 1, "stride": stride} | {side: sizes[side] for side in elastic}
    selection = select(kind, 6, 3)

    def gradients(convolve, *tensors):
        x, weight, grad = (tensor.detach().requires_grad_() for tensor in tensors)
        return torch.autograd.grad(convolve(x, weight, None, selection, **keywords), (x, weight), grad)

    exact, scale = (
        gradients(masked_conv2d, *(f(t.double()) for t in (x, weight, grad))) for f in (torch.clone, torch.abs)
    )
    peers = by_onednn(lambda: gradients(dynamic_conv2d, x, weight, grad))
    for got, *others in zip(gradients(dynamic_conv2d, x, weight, grad), peers, exact, scale, strict=True):
        assert_as_accurate(got, *others, FACTOR)


@given(
    case=st.one_of(
        st.tuples(st.just(torch.float32), st.sampled_from([3, 16, 33, 128]), st.sampled_from([3, 5, 16, 40])),
        st.tuples(st.just(torch.bfloat16), st.sampled_from([16, 32, 48, 64]), st.sampled_from([16, 32, 48, 96])),
    ),
    batch=st.sampled_from([1, 2, 5, 17]),
    size=st.tuples(st.integers(4, 21), st.integers(4, 35)),
    kernel=st.sampled_from([(1, 1), (3, 3), (5, 3), (2, 4)]),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    **SELECTIONS,
)
@examples(50)
def test_weight_gradients_of_any_shape(case, batch, size, kernel, stride, padding, sides, kind, cut, seed):
    dtype, *channels = case
    assume(all(side + 2 * p >= k for side, p, k in zip(size, padding, kernel, strict=True)))
    W_out = (size[1] + 2 * padding[1] - kernel[1]) // stride[1] + 1
    assume(dtype == torch.float32 or stride == (1, 1) or W_out > 1)  # as above
    check_gradient("weight", dtype, channels, batch, size, kernel, stride, padding, sides, kind, cut, seed)


def check_gradient(of, dtype, channels, batch, size, kernel, stride, padding, sides, kind, cut, seed):
    """The gradient of `of`, x or weight, is as accurate as oneDNN's, and reads nothing that was not selected."""
    torch.manual_seed(seed)
    x, weight = torch.randn(batch, channels[0], *size).to(dtype), torch.randn(*channels[::-1], *kernel).to(dtype)
    keywords = {f"{side}_groups": parts(c, cut) for side, c in zip(("in", "out"), channels, strict=True)}
    keywords = {name: sizes for name, sizes in keywords.items() if sides in (name.removesuffix("_groups"), "both")}
    selection, keywords = select(kind, batch, 3, seed), keywords | {"stride": stride, "padding": padding}
    grad = torch.randn(masked_conv2d(x, weight, None, selection, **keywords).shape).to(dtype)

    def gradient(convolve, x, weight, grad):
        x, weight = x.detach().requires_grad_(of == "x"), weight.detach().requires_grad_(of == "weight")
        leaf = x if of == "x" else weight
        return torch.autograd.grad(convolve(x, weight, None, selection, **keywords), leaf, grad)[0]

    exact, scale = (
        gradient(masked_conv2d, *(f(t.double()) for t in (x, weight, grad))) for f in (torch.clone, torch.abs)
    )
    if of == "weight" and "in_groups" in keywords:
        x = poison_unread(x, selection, keywords["in_groups"])
    if "out_groups" in keywords:
        grad = poison_unread(grad, selection, keywords["out_groups"])
    tensors = channels_last(x), weight, channels_last(grad)
    peer = by_onednn(lambda: gradient(dynamic_conv2d, *tensors))
    assert_as_accurate(gradient(dynamic_conv2d, *tensors), peer, exact, scale, FACTOR)


@DTYPES
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", [1, 8, 9])
def test_an_infinite_input_reaches_the_weights_that_read_it_alone(width, stride, dtype):
    """The last column meets fewer taps than the others; in bfloat16 pixels go by twos, and the last may be alone."""
    if not runs(dtype, 16, 16):
        pytest.skip("this CPU has no direct kernel for it: oneDNN's is not ours to answer for")
    if dtype == torch.bfloat16 and extension.bf16_isa() == "AMX":
        pytest.skip("with AMX, what lies beside a row is multiplied by zeros")
    torch.manual_seed(0)
    x, levels = torch.randn(3, 16, 4, width).to(dtype), torch.tensor([1, 2, 1])
    x[1, 3, 2, -1] = float("inf")
    keywords = {"padding": 1, "stride": stride}

    def gradient(x):
        weight = torch.zeros(16, 16, 3, 3, dtype=x.dtype, requires_grad=True)
        y = dynamic_conv2d(x, weight, None, levels, out_groups=(8, 8), **keywords)
        return torch.autograd.grad(y, weight, torch.ones_like(y))[0]

    reads = gradient(torch.where(x.isinf(), 1.0, 0.0).double()) != 0
    assert torch.equal(~gradient(channels_last(x)).isfinite(), reads)


@DTYPES
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 16, 40, 50), (40, 48, 3, 5), (5, 33, 14, 14)], ids=str)
def test_weight_gradients_of_bands_and_groups_of_instances(shape, threads, dtype):
    """Maps of more pixels than a tile sums at once, one instance for all threads, many small maps together."""
    torch.manual_seed(0)
    x, grad = (channels_last(torch.randn(shape[0], C, *shape[2:])).to(dtype) for C in (shape[1], 32))
    weight, levels = torch.zeros(32, shape[1], 3, 3, dtype=dtype), torch.arange(shape[0]) % 3 + (shape[0] == 1)

    def gradient(x, weight, grad):
        y = dynamic_conv2d(x, weight.requires_grad_(), None, levels, padding=1, out_groups=(7, 25))
        return torch.autograd.grad(y, weight, grad)[0]

    exact, before = gradient(x.double(), weight.double(), grad.double()), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = gradient(x, weight, grad)
        assert torch.equal(gradient(x, weight, grad), got)
    finally:
        torch.set_num_threads(before)
    rounded = dtype != torch.float32 and not extension.has_direct_bf16()  # a level's part, before it is added
    near = 1e-4 if dtype == torch.float32 else 2**-6 if rounded else 2**-8
    torch.testing.assert_close(got.double(), exact, rtol=near, atol=near * exact.abs().max().item())


def test_only_amx_leaves_strided_weight_gradients_in_bfloat16_to_onednn(monkeypatch):
    called = []
    x, weight = channels_last(torch.zeros(2, 16, 8, 8).bfloat16()), torch.zeros(32, 16, 3, 3).bfloat16()
    geometry, route = GEOMETRY._replace(stride=(2, 1)), RoutingPlan.from_levels(torch.ones(2, 1, dtype=torch.int64), 2)
    monkeypatch.setattr(_conv_direct, "_window", lambda *_: None)  # which are kept
    for isa in ("AVX-512 BF16", "AMX"):
        fake = SimpleNamespace(
            has_direct_bf16=lambda: True,
            bf16_isa=lambda isa=isa: isa,
            dynamic_conv_weight_gradient=lambda *_, isa=isa: called.append(isa),
        )
        monkeypatch.setattr(_conv_direct, "extension", fake)
        grad = torch.zeros(2, 32, 4, 8).bfloat16()
        _conv_direct.gradients(grad, x, weight, route[0], geometry, (False, True))
    assert called == ["AVX-512 BF16"]


@given(
    case=st.one_of(
        st.tuples(st.just(torch.float32), st.sampled_from([3, 16, 33]), st.sampled_from([5, 16, 40])),
        st.tuples(st.just(torch.bfloat16), st.sampled_from([16, 48]), st.sampled_from([16, 32])),
    ),
    batch=st.sampled_from([1, 2, 5]),
    size=st.tuples(st.integers(1, 13), st.integers(1, 21)),
    kernel=st.sampled_from([(1, 1), (3, 3), (5, 3), (2, 4), (7, 7)]),
    stride=st.sampled_from([(2, 2), (1, 2), (3, 1), (2, 3), (4, 4)]),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    **SELECTIONS,
)
@examples(50)
def test_input_gradients_of_any_stride(case, batch, size, kernel, stride, padding, sides, kind, cut, seed):
    dtype, *channels = case
    assume(all(side + 2 * p >= k for side, p, k in zip(size, padding, kernel, strict=True)))
    check_gradient("x", dtype, channels, batch, size, kernel, stride, padding, sides, kind, cut, seed)


@DTYPES
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_the_usual_strided_convolutions_take_the_direct_input_gradient(kernel, dtype):
    if not runs(dtype, 16, 32) or (dtype == torch.bfloat16 and extension.bf16_isa() == "AMX"):
        pytest.skip("this CPU has no direct kernel for it")
    torch.manual_seed(0)
    x, weight = channels_last(torch.randn(3, 16, 8, 7)).to(dtype), torch.randn(32, 16, kernel, kernel).to(dtype)
    geometry = GEOMETRY._replace(stride=(2, 2), padding=(kernel // 2, kernel // 2), out_sizes=(16, 16))
    route = RoutingPlan.from_levels(torch.tensor([[1], [0], [2]]), 2)[0]
    grad = channels_last(torch.randn(3, 32, 4, 4)).to(dtype)
    dx = _conv_direct.strided_input_gradient(grad, x, weight, route, geometry)
    assert dx.shape == x.shape
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert not dx[1].any()
    if kernel == 1:
        assert not dx[:, :, 1::2].any()
        assert dx[0, :, ::2, ::2].all()
