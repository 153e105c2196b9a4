"""The inverted residual, whole and composed, against the modules it is of in float64 with the channels masked."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from den_kernels import (
    DynamicConv2d,
    InvertedResidualWeights,
    dynamic_inverted_residual,
    dynamic_inverted_residual_,
)
from den_kernels._extension import extension
from den_kernels.activations import ACTIVATIONS
from den_kernels.dynamic_inverted_residual import OPERANDS, dynamic_inverted_residual_reference
from den_kernels.plan import as_route
from den_kernels.testing import channel_mask, float32_limited_to, make_levels, make_mask
from tests.fuzz import examples
from tests.oracle import unlike_new

LIMITS = {torch.float32: 2**-16, torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float64: 2**-40}
HAS_DIRECT = extension is not None and extension.has_direct_float32()


class Block(nn.Module):
    """conv1, norm, activation; conv2 (depthwise), norm, activation; gates; conv3, norm; and x."""

    def __init__(self, C, groups, C_out, kernel=(3, 3), stride=1, squeezed=0, act="relu6", expands=True, norms=True):
        super().__init__()
        torch.manual_seed(0)
        M, self.act, self.groups = sum(groups), act, groups
        self.skip = stride == 1 and C_out == C
        norm = nn.BatchNorm2d if norms else (lambda channels: None)
        self.conv1 = DynamicConv2d(C, M, 1, bias=not norms, out_groups=groups) if expands else None
        self.bn1 = norm(M) if expands else None
        self.conv2 = self.bn2 = None
        if kernel is not None:
            padding = tuple(side // 2 for side in kernel)
            self.conv2 = DynamicConv2d(M, M, kernel, stride, padding, groups=M, bias=not norms, out_groups=groups)
            self.bn2 = norm(M)
        self.squeeze = nn.Conv2d(M, squeezed, 1) if squeezed else None
        self.excite = nn.Conv2d(squeezed, M, 1) if squeezed else None
        self.conv3, self.bn3 = nn.Conv2d(M, C_out, 1, bias=not norms), norm(C_out)
        unlike_new(self).eval()

    def fold(self):
        return InvertedResidualWeights.fold(
            self.conv1, self.bn1, self.conv2, self.bn2, self.conv3, self.bn3, self.squeeze, self.excite,
            activation=self.act, squeeze_activation="silu", gate_activation="hardsigmoid", skip=self.skip,
        )  # fmt: skip

    def forward(self, x, selection):
        """The oracle."""
        act, chosen = ACTIVATIONS[self.act], channel_mask(selection, self.groups)[:, :, None, None]
        h = x
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2)):
            if conv is not None:
                h = F.conv2d(h, conv.weight, conv.bias, conv.stride, conv.padding, 1, conv.groups)
                h = act(h if norm is None else norm(h)) * chosen
        if self.squeeze is not None:
            h = h * F.hardsigmoid(self.excite(F.silu(self.squeeze(h.mean((2, 3), keepdim=True)))))
        h = self.conv3(h)
        h = (h if self.bn3 is None else self.bn3(h)) * chosen.any(1, keepdim=True)
        return x + h if self.skip else h


def image(batch, C, size, dtype=torch.float32, seed=1):
    x = torch.randn(batch, C, *size, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def choose(kind, batch, groups, seed=0):
    return make_mask(batch, groups, seed) if kind == "mask" else make_levels(kind, batch, groups, seed)


@torch.no_grad()
def check(block, x, selection):
    """No element errs more than twice what the modules do in the dtype of x, and a few roundings."""
    weights, peer = block.to(x.dtype).fold(), block(x, selection).double()
    exact = block.double()(x.double(), selection)
    largest = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
    bound = 2 * (peer - exact).abs().max().item() + LIMITS[x.dtype] * largest if exact.numel() else 0.0
    for each in (weights, replace(weights, direct=None), weights.released()):
        if each.direct is None and torch.isnan(each.conv3).any():
            continue
        got = dynamic_inverted_residual(x, selection, each)
        assert (got.dtype, got.shape) == (x.dtype, exact.shape)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert not got.numel() or (got.double() - exact).abs().max() <= bound
        idle = (selection.sum(1) if selection.dtype == torch.bool else selection) == 0
        assert torch.equal(got[idle], x[idle] if block.skip else torch.zeros_like(got[idle]))
        if got.shape == x.shape and weights.stride == 1:
            over = x.clone(memory_format=torch.channels_last)
            assert dynamic_inverted_residual_(over, selection, each) is over
            assert not over.numel() or (over.double() - exact).abs().max() <= bound
            # A map of one channel or pixel has either memory format, and torch a kernel with another sum for each.
            assert each.direct is None or torch.equal(over, got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_blocks_are_the_float32_ones_of_their_weights_rounded_once(dtype):
    """Hidden maps are not rounded to 16 bits in between; a pair of 1 x 1 convolutions has kernels of its own."""
    half = Block(24, (16, 5, 30), 24, squeezed=6).to(dtype).fold()
    convs = ("conv1", "conv2", "conv3", "squeeze", "excite")
    wide = replace(half, direct=None, **{name: getattr(half, name).float() for name in convs})
    assert (half.direct is not None) == HAS_DIRECT
    assert Block(24, (16, 5, 30), 24, kernel=None).to(dtype).fold().direct is None
    if HAS_DIRECT:
        x, selection = image(5, 24, (9, 7), dtype), choose("uniform", 5, 3)
        wanted = dynamic_inverted_residual(x.float(), selection, wide._with_direct()).to(dtype)
        assert torch.equal(dynamic_inverted_residual(x, selection, half), wanted)


@examples(60)
@given(
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    C=st.sampled_from([3, 16, 24]),
    groups=st.sampled_from([(16, 16), (12, 12, 12), (7, 9), (16, 5, 30), (1,)]),
    grows=st.sampled_from([0, 0, 9]),
    kernel=st.sampled_from([(3, 3), (1, 1), (5, 3), (5, 5), (7, 7), None]),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    stride=st.sampled_from([1, 2, 3]),
    squeezed=st.sampled_from([0, 0, 5, 20]),
    act=st.sampled_from(["relu", "relu6", "silu", "hardswish", "gelu", "none"]),
    expands=st.booleans(),
    norms=st.booleans(),
    batch=st.integers(0, 5),
    kind=st.sampled_from(["mask", "uniform", "top", "zero"]),
)
def test_it_is_the_modules(
    dtype, C, groups, grows, kernel, size, stride, squeezed, act, expands, norms, batch, kind
):  # fmt: skip
    C = C if expands or kernel is None else sum(groups)
    stride, squeezed = (1, 0) if kernel is None else (stride, squeezed)
    block = Block(C, groups, C + grows, kernel, stride, squeezed, act, expands or kernel is None, norms)
    check(block, image(batch, C, size, dtype), choose(kind, batch, len(groups)))


@pytest.mark.parametrize("isa", ["AVX2", "AVX-512"])
@pytest.mark.parametrize("squeezed", [0, 6])
@pytest.mark.parametrize("size", [(7, 7), (3, 2), (70, 90)], ids=str)
def test_bands_and_groups_of_instances_in_each_instruction_set(size, squeezed, isa):
    """Maps beyond the scratch memory, many small maps together, rows shorter than a strip."""
    with float32_limited_to(isa):
        if not HAS_DIRECT or extension.float32_isa() != isa:
            pytest.skip(f"this CPU has no {isa}")
        batch = 2 if size[0] > 9 else 20
        for stride, kernel in ((1, (3, 3)), (2, (5, 5))):
            block = Block(24, (36, 36, 36), 24, kernel, stride, squeezed, "silu")
            check(block, image(batch, 24, size), choose("uniform", batch, 3))


@pytest.mark.skipif(not HAS_DIRECT, reason="this CPU has no AVX2")
@pytest.mark.parametrize("kernel", [(5, 5), None], ids=["depthwise", "pair"])
@pytest.mark.parametrize("squeezed", [0, 6])
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_threads_and_instruction_sets_change_no_bit(batch, squeezed, kernel):
    block = Block(16, (20, 20, 24), 16, kernel, 1, squeezed if kernel else 0, "gelu" if kernel is None else "silu")
    weights, x, own, before = (
        block.fold(),
        image(batch, 16, (13, 9)),
        choose("uniform", batch, 3),
        torch.get_num_threads(),
    )
    results = []
    try:
        for isa in ("AVX2", extension.float32_isa()):
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                with float32_limited_to(isa):
                    results.append(dynamic_inverted_residual(x, own, weights))
                    over = x.clone(memory_format=torch.channels_last)
                    results.append(dynamic_inverted_residual_(over, own, weights))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, results[0]) for each in results)


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
def test_activations_are_those_of_torch(act):
    """Over all magnitudes, through a pair of convolutions that are the identity; what is no number stays none."""
    x = torch.cat(
        [torch.linspace(-12, 12, 4001), torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, torch.nan])]
    )
    maps = image(1, 1, (1, len(x)))
    maps[0, 0, 0] = x
    conv1, conv3 = DynamicConv2d(1, 1, 1, bias=False, out_groups=1), nn.Conv2d(1, 1, 1, bias=False)
    for conv in (conv1, conv3):
        nn.init.ones_(conv.weight)
    weights = InvertedResidualWeights.fold(conv1, None, None, None, conv3, None, activation=act, skip=False)
    got = dynamic_inverted_residual(maps, torch.tensor([1]), weights)[0, 0, 0]
    assert got[-1].isnan()
    wanted = ACTIVATIONS[act](x.double())
    size = x.abs().clamp(max=6) if act == "gelu" else torch.tensor(0.1)  # x / 2 * (1 + erf): the sum cancels
    assert bool(((got - wanted).abs() <= 4e-7 * torch.maximum(wanted.abs(), size))[:-1].all())


def test_a_nan_stays_in_its_image_and_inside_the_reach_of_the_kernel():
    block = Block(16, (16, 16), 16, act="silu")
    weights, x = block.fold(), image(3, 16, (9, 9))
    own = torch.tensor([2, 2, 1])
    clean = dynamic_inverted_residual(x, own, weights)
    x[1, 5, 4, 4] = torch.nan
    got = dynamic_inverted_residual(x, own, weights)
    near = torch.zeros(9, 9, dtype=torch.bool)
    near[3:6, 3:6] = True
    assert got[1, :, near].isnan().all()
    assert torch.equal(got[1, :, ~near], clean[1, :, ~near])
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(("squeezed", "masks"), [(0, False), (4, True)])
def test_opcheck(squeezed, masks):
    weights, x = Block(8, (8, 8), 8, squeezed=squeezed).fold(), image(3, 8, (5, 5))
    route = as_route(choose("mask" if masks else "uniform", 3, 2), 2, 3)
    operands, ops = OPERANDS.of(route, weights), torch.ops.den_kernels
    torch.library.opcheck(ops.dynamic_inverted_residual, (x, *operands))
    torch.library.opcheck(ops.dynamic_inverted_residual, (x, *operands, x.clone()))
    torch.library.opcheck(ops.dynamic_inverted_residual_, (x, *operands))


def test_another_shortcut_is_added_in_the_place_of_x():
    block = Block(8, (8, 8), 12, stride=2)
    weights, x, own = block.fold(), image(4, 8, (5, 5)), torch.tensor([0, 1, 2, 2])
    shortcut = torch.randn(4, 12, 3, 3)
    for each in (weights, replace(weights, direct=None)):
        got = dynamic_inverted_residual(x, own, each, shortcut)
        torch.testing.assert_close(got, shortcut + dynamic_inverted_residual(x, own, each))
    reference = dynamic_inverted_residual_reference(x, as_route(own, 2, 4), weights, shortcut)
    torch.testing.assert_close(got, reference, rtol=1e-5, atol=1e-5)


def layers(**changes):
    made = {"conv1": nn.Conv2d(8, 16, 1), "bn1": None, "conv2": nn.Conv2d(16, 16, 3, padding=1, groups=16), "bn2": None,
            "conv3": nn.Conv2d(16, 8, 1), "bn3": None}  # fmt: skip
    return InvertedResidualWeights.fold(**(made | changes))


BAD = {
    "no convolution": ({"conv1": nn.Linear(8, 16)}, TypeError, "conv1 must be an nn.Conv2d, got Linear"),
    "no norm": ({"bn1": nn.ReLU()}, TypeError, "bn1 must be an nn.BatchNorm2d, got ReLU"),
    "nothing before conv3": ({"conv1": None, "conv2": None}, ValueError, "one of conv1 and conv2 must be given"),
    "a wide kernel": ({"conv1": nn.Conv2d(8, 16, 3, padding=1)}, ValueError, "conv1 must have a kernel of 1 x 1"),
    "not depthwise": ({"conv2": nn.Conv2d(16, 16, 3, padding=1)}, ValueError, "conv2 must be depthwise"),
    "nine by nine": ({"conv2": nn.Conv2d(16, 16, 9, padding=4, groups=16)}, ValueError, "at most 49 taps"),
    "no padding": ({"conv2": nn.Conv2d(16, 16, 3, groups=16)}, ValueError, "'same' zero padding"),
    "channels": ({"conv3": nn.Conv2d(12, 8, 1)}, ValueError, "must take the 16 channels"),
    "squeeze alone": ({"squeeze": nn.Conv2d(16, 4, 1)}, ValueError, "squeeze and excite must be both given"),
    "another squeeze": (
        {"squeeze": nn.Conv2d(16, 4, 1), "excite": nn.Conv2d(3, 16, 1)}, ValueError, "must take the 4 channels",
    ),
    "an unknown activation": ({"activation": "tanh"}, ValueError, "activation must be one of none, .* got 'tanh'"),
    "no skip": ({"conv3": nn.Conv2d(16, 9, 1)}, ValueError, "skip must be False .* got True with 8 to 9 channels"),
    "another dtype": ({"conv1": nn.Conv2d(8, 16, 1).double()}, TypeError, "conv1.weight must be torch.float32"),
    "a norm of others": ({"bn1": nn.BatchNorm2d(8)}, ValueError, r"bn1.weight must be \[16\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_layers_that_are_none_of_a_block_are_refused(case):
    changes, error, message = BAD[case]
    layers()
    with pytest.raises(error, match=f"dynamic_inverted_residual: .*{message}"):
        layers(**changes)
