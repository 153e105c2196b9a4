"""`dynamic_bottleneck` on weights of any kind, whole and composed, against its definition and the modules it is of."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from den_kernels import BottleneckWeights, DynamicConv2d, dynamic_bottleneck, dynamic_bottleneck_
from den_kernels.dynamic_bottleneck import OPERANDS, dynamic_bottleneck_reference
from den_kernels.plan import as_route
from den_kernels.testing import channel_mask, make_levels, make_mask
from tests.fuzz import examples
from tests.oracle import unlike_new

LIMITS = {torch.float32: 2**-15, torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float64: 2**-40}


class Block(nn.Module):
    """conv3(relu(bn3(conv2(relu(bn2(conv1(relu(bn1(x))))))))).

    post: bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))), and ReLU of the sum.
    """

    def __init__(self, C, groups, C_out, kernel=(3, 3), stride=1, cardinality=1, first=False, bias=False, post=False):
        super().__init__()
        torch.manual_seed(0)
        M, padding, self.post = sum(groups), tuple(side // 2 for side in kernel), post
        self.bn1 = None if first and not post else nn.BatchNorm2d(M if post else C)
        self.conv1, self.bn2 = DynamicConv2d(C, M, 1, bias=bias, out_groups=groups), nn.BatchNorm2d(M)
        self.conv2 = nn.Conv2d(M, M, kernel, stride, padding, groups=cardinality, bias=bias)
        self.bn3, self.conv3 = nn.BatchNorm2d(C_out if post else M), nn.Conv2d(M, C_out, 1, bias=bias)
        unlike_new(self).eval()

    def fold(self):
        layers = self.conv1, self.bn1, self.conv2, self.bn2, self.conv3, self.bn3
        return BottleneckWeights.fold(*layers, post_activation=self.post)


def image(batch, C, size, dtype=torch.float32, seed=1):
    x = torch.randn(batch, C, *size, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def wide(weights):
    """The same numbers in float64."""
    fields = {name: getattr(weights, name) for name in weights.__dataclass_fields__} | {"direct": None}
    return BottleneckWeights(**{name: f.double() if isinstance(f, torch.Tensor) else f for name, f in fields.items()})


def check(x, selection, weights, shortcut=None):
    """No element errs more than twice what the definition does in the dtype of x, and a few roundings."""
    route = as_route(selection, len(weights.groups), len(x))
    x = x.relu() if weights.relu else x
    twin = None if shortcut is None else shortcut.double()
    exact = dynamic_bottleneck_reference(x.double(), route, wide(weights), twin)
    bound = 0.0
    if exact.numel():
        plain = dynamic_bottleneck_reference(x, route, weights, shortcut).double()
        bound = 2 * (plain - exact).abs().max().item() + LIMITS[x.dtype] * max(1.0, exact.abs().max().item())
    for each in (weights, replace(weights, direct=None)):
        got = dynamic_bottleneck(x, selection, each, shortcut)
        assert got.dtype == x.dtype
        assert got.shape == exact.shape
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert not got.numel() or (got.double() - exact).abs().max() <= bound
        idle = route.levels == 0
        wanted = _shortcut(x, weights, shortcut)[idle]
        if shortcut is None and weights.stride == 3 and wanted.numel():  # a third is rounded: not the same bits
            assert (got[idle].double() - wanted.double()).abs().max() <= 8 * torch.finfo(x.dtype).eps * x.abs().max()
        else:
            assert torch.equal(got[idle], wanted)
        if shortcut is None and weights.stride == 1 and got.shape == x.shape:
            over = x.clone(memory_format=torch.channels_last)
            assert dynamic_bottleneck_(over, selection, each) is over
            assert torch.equal(over, got)


def _shortcut(x, weights, shortcut):
    if shortcut is not None:
        return shortcut.relu() if weights.relu else shortcut
    pooled = F.avg_pool2d(x, weights.stride, ceil_mode=True) if weights.stride > 1 else x
    return F.pad(pooled, (0, 0, 0, 0, 0, weights.out_channels - x.shape[1]))


@examples(40)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    C=st.sampled_from([3, 16, 20, 32]),
    groups=st.sampled_from([(16, 16), (32,), (4, 8, 4), (7, 9), (16, 48)]),
    grows=st.integers(0, 17),
    kernel=st.sampled_from([(3, 3), (1, 1), (5, 3)]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    stride=st.sampled_from([1, 2, 3]),
    cardinal=st.booleans(),
    batch=st.integers(0, 5),
    kind=st.sampled_from(["mask", "uniform", "top", "zero"]),
    first=st.booleans(),
    bias=st.booleans(),
    given_shortcut=st.booleans(),
    post=st.booleans(),
)
def test_it_is_the_definition(
    dtype, C, groups, grows, kernel, size, stride, cardinal, batch, kind, first, bias, given_shortcut, post
):
    cardinality = 4 if cardinal and all(group % 4 == 0 for group in groups) else 1
    block = Block(C, groups, C + grows, kernel, stride, cardinality, first, bias, post)
    for conv in (block.conv1, block.conv2, block.conv3):
        conv.to(dtype)
    selection = make_mask(batch, len(groups)) if kind == "mask" else make_levels(kind, batch, len(groups))
    out = (-(-size[0] // stride), -(-size[1] // stride))
    check(
        image(batch, C, size, dtype),
        selection,
        block.fold(),
        image(batch, C + grows, out, dtype, 2) if given_shortcut else None,
    )


@pytest.mark.parametrize("cardinality", [1, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_definition_is_the_modules_with_the_selected_channels(stride, cardinality):
    block, x, levels = (
        Block(8, (8, 8, 16), 12, (3, 3), stride, cardinality).double(),
        image(4, 8, (7, 6)).double(),
        [3, 0, 1, 2],
    )
    got = dynamic_bottleneck(x, torch.tensor(levels), block.fold())
    for b, level in enumerate(levels):
        width, unit = (0, 8, 16, 32)[level], 32 // cardinality
        expected = _shortcut(x, block.fold(), None)[b : b + 1]
        if level:
            with torch.no_grad():
                h = block.bn2(block.conv1(block.bn1(x[b : b + 1]).relu())).relu()[:, :width]
                weight = block.conv2.weight[:width, : width if cardinality == 1 else unit]
                h = F.conv2d(h, weight, None, stride, 1, 1, 1 if cardinality == 1 else width // unit)
                h = block.bn3(F.pad(h, (0, 0, 0, 0, 0, 32 - width))).relu()[:, :width]
                expected = expected + F.conv2d(h, block.conv3.weight[:, :width])
        torch.testing.assert_close(got[b : b + 1], expected)


@pytest.mark.parametrize("groups", [(16, 16, 32), (7, 9)], ids=["whole", "composed"])
def test_a_post_activation_block_is_its_modules(groups):
    block, x = Block(16, groups, 32, bias=True, post=True), image(5, 16, (7, 6)).relu()
    levels, shortcut = torch.tensor([0, 1, 2, len(groups), 0]), image(5, 32, (7, 6), seed=2)
    chosen = channel_mask(levels, groups)[:, :, None, None]
    with torch.no_grad():
        h = torch.where(chosen, block.bn1(block.conv1(x)).relu(), 0)
        h = torch.where(chosen, block.bn2(block.conv2(h)).relu(), 0)
        branch = torch.where((levels > 0)[:, None, None, None], block.bn3(block.conv3(h)), 0)
    got = dynamic_bottleneck(x, levels, block.fold(), shortcut)
    torch.testing.assert_close(got, (shortcut + branch).relu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("groups", [(16, 16), (8, 6)], ids=["whole", "composed"])
def test_opcheck(groups, masks):
    block, x = Block(16, groups, 16), image(3, 16, (5, 6))
    selection = make_mask(3, 2) if masks else torch.tensor([2, 0, 1])
    operands = OPERANDS.of(as_route(selection, 2, 3), block.fold())
    torch.library.opcheck(torch.ops.den_kernels.dynamic_bottleneck, (x, *operands))
    torch.library.opcheck(torch.ops.den_kernels.dynamic_bottleneck, (x, *operands, x.clone()))
    torch.library.opcheck(torch.ops.den_kernels.dynamic_bottleneck_, (x, *operands))
    shrinking = Block(16, groups, 32, stride=2)
    operands = OPERANDS.of(as_route(selection, 2, 3), shrinking.fold())
    torch.library.opcheck(torch.ops.den_kernels.dynamic_bottleneck, (x, *operands))


def test_released_weights_hold_packed_copies_alone():
    weights, x, levels = Block(16, (16, 16), 16).fold(), image(3, 16, (5, 6)), torch.tensor([2, 0, 1])
    if weights.direct is None:
        pytest.skip("without a kernel of the whole block nothing is packed")
    released = weights.released()
    assert torch.equal(dynamic_bottleneck(x, levels, released), dynamic_bottleneck(x, levels, weights))
    assert all(conv.untyped_storage().nbytes() == 4 for conv in (released.conv1, released.conv2, released.conv3))
    composed = Block(16, (8, 6), 16).fold()
    assert composed.released() is composed


def other(**changes):
    """The layers of a block, some of them replaced."""
    block = Block(16, (16, 16), 16)
    names = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")
    return {name: getattr(block, name) for name in names} | changes


BAD_LAYERS = {
    "conv1 of 3 x 3": (other(conv1=nn.Conv2d(16, 32, 3, padding=1)), "conv1 must have a kernel of 1 x 1"),
    "conv1 with a stride": (other(conv1=nn.Conv2d(16, 32, 1, 2)), "conv1 must have stride 1, got 2"),
    "conv2 without padding": (other(conv2=nn.Conv2d(32, 32, 3)), "conv2 must have an odd kernel, 'same' zero padding"),
    "conv2 of other channels": (other(conv2=nn.Conv2d(16, 32, 3, padding=1)), "must take conv1's 32 channels"),
    "no bn1": (other(bn1=None) | {"post_activation": True}, "bn1 must be a batch norm in a post-activation block"),
    "conv3 to fewer channels": (other(conv3=nn.Conv2d(32, 8, 1, bias=False)), "conv3 at least 16, got"),
    "groups across cardinality groups": (
        other(conv1=DynamicConv2d(16, 32, 1, out_groups=(12, 20)), conv2=nn.Conv2d(32, 32, 3, padding=1, groups=4)),
        "conv1.out_groups must be multiples of conv2's 8 channels a group, got \\(12, 20\\)",
    ),
    "bn3 of other channels": (other(bn3=nn.BatchNorm2d(16)), r"bn3.weight must be \[32\] on cpu, got \[16\] on cpu"),
    "bn2 without statistics": (
        other(bn2=nn.BatchNorm2d(32, track_running_stats=False)), "bn2 must track running statistics"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LAYERS)
def test_layers_that_do_not_fit_are_refused(case):
    layers, message = BAD_LAYERS[case]
    with pytest.raises(ValueError, match=f"dynamic_bottleneck: .*{message}"):
        BottleneckWeights.fold(**layers)


def test_convolutions_of_different_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"dynamic_bottleneck: conv3\.weight must be torch\.float32 as conv1 is"):
        BottleneckWeights.fold(**other(conv3=nn.Conv2d(32, 16, 1, bias=False).double()))


BAD_CALLS = {
    "channels": ((2, 8, 4, 4), torch.tensor([1, 2]), None, ValueError, r"x must be \[B, 16, H, W\]"),
    "no pixels": ((2, 16, 0, 4), torch.tensor([1, 2]), None, ValueError, "H and W of at least 1"),
    "levels": ((2, 16, 4, 4), torch.tensor([1, 3]), None, ValueError, "levels must be in 0..2, got 3"),
    "instances": ((2, 16, 4, 4), torch.tensor([1]), None, ValueError, r"levels must be \[2\], got \[1\]"),
    "shortcut": ((2, 16, 4, 4), torch.tensor([1, 2]), torch.zeros(2, 8, 4, 4), ValueError, r"shortcut must be \[2, 16"),
    "shortcut's dtype": (
        (2, 16, 4, 4), torch.tensor([1, 2]), torch.zeros(2, 16, 4, 4).double(), TypeError, "must be torch.float32 as x"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case):
    shape, selection, shortcut, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        dynamic_bottleneck(torch.zeros(shape), selection, Block(16, (16, 16), 16).fold(), shortcut)


def test_gradients_are_refused():
    x = image(2, 16, (4, 4)).requires_grad_()
    for op in (dynamic_bottleneck, dynamic_bottleneck_):
        with pytest.raises(ValueError, match="dynamic_bottleneck: x must not require a gradient"):
            op(x, torch.tensor([1, 2]), Block(16, (16, 16), 16).fold())
