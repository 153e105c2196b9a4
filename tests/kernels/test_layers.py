"""DynamicConv2d: nn.Conv2d in everything but its forward with a selection."""

import copy
import pickle
from itertools import product

import pytest
import torch
from torch import nn

from den_kernels._geometry import memory_format_of
from den_kernels.dynamic_conv import dynamic_conv2d_reference
from den_kernels.layers import DynamicConv2d
from den_kernels.plan import RoutingPlan
from den_kernels.testing import assert_as_accurate, masked_conv2d

LEVELS = torch.tensor([2, 0, 1, 2])

LAYERS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2)},
    "same": {"kernel_size": (2, 3), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": 3, "padding": "valid", "bias": False},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "replicate"},
    "circular_same": {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
    "depthwise": {"kernel_size": 3, "groups": 8},
}


@pytest.mark.parametrize("name", LAYERS)
def test_without_a_selection_it_is_conv2d(name):
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 16, **LAYERS[name])
    torch.manual_seed(0)
    dynamic = DynamicConv2d(8, 16, **LAYERS[name], out_groups=(4, 12))
    assert list(plain.state_dict()) == list(dynamic.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), dynamic.parameters(), strict=True))
    x = torch.randn(4, 8, 9, 9)
    shared = DynamicConv2d.from_conv(plain, out_groups=(4, 12))
    assert torch.equal(shared(x), plain(x))
    torch.testing.assert_close(dynamic(x), plain(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(shared(x[0]), plain(x[0]))


@pytest.mark.parametrize("name", LAYERS)
def test_with_levels_it_is_the_masked_conv2d(name):
    conv = DynamicConv2d(8, 16, **LAYERS[name], out_groups=(4, 12))
    x = torch.randn(4, 8, 9, 9)
    padded, padding = x, conv.padding
    if conv.padding_mode != "zeros":
        padded, padding = nn.functional.pad(x, conv._reversed_padding_repeated_twice, conv.padding_mode), 0
    keywords = {"stride": conv.stride, "padding": padding, "dilation": conv.dilation, "groups": conv.groups}
    bias = conv.bias.double() if conv.bias is not None else None
    exact = dynamic_conv2d_reference(
        padded.double(), conv.weight.double(), bias, LEVELS, **keywords, out_groups=(4, 12)
    )  # fmt: skip
    peer = masked_conv2d(padded, conv.weight, conv.bias, LEVELS, **keywords, out_groups=(4, 12))
    assert_as_accurate(conv(x, LEVELS), peer, exact)


def test_layers_share_a_route():
    first = DynamicConv2d(3, 8, 3, padding=1, out_groups=2)
    second = DynamicConv2d(8, 3, 3, padding=1, in_groups=2)
    route = RoutingPlan.from_levels(LEVELS[:, None], 2)[0]
    x = torch.randn(4, 3, 6, 6)
    y = second(first(x, route), route)
    torch.testing.assert_close(y, second(first(x, LEVELS)), rtol=1e-5, atol=1e-5)
    assert torch.equal(y[1], second.bias[:, None, None].expand(3, 6, 6))


def test_from_conv_shares_parameters_and_state():
    conv = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False, dtype=torch.bfloat16).eval()
    conv.register_forward_hook(lambda *_: pytest.fail("a hook was copied"))
    conv.weight.requires_grad_(False)
    state = torch.get_rng_state()
    dynamic = DynamicConv2d.from_conv(conv, in_groups=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert dynamic.weight is conv.weight
    assert dynamic.bias is None
    assert not dynamic.training
    assert not dynamic.weight.requires_grad
    assert dynamic.padding_mode == "circular"
    assert dynamic(torch.zeros(1, 4, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    regrouped = DynamicConv2d.from_conv(dynamic, out_groups=3)
    assert regrouped.out_groups == (2, 2, 2)
    assert regrouped.in_groups == ()


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Linear(3, 3), nn.LazyConv2d(3, 3), Doubled(3, 3, 3),
        torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)),
    ],
    ids=["linear", "lazy", "another_forward", "parametrized"],
)  # fmt: skip
def test_from_conv_refuses_what_computes_something_else(conv):
    with pytest.raises(TypeError, match=r"conv must be an initialized nn\.Conv2d"):
        DynamicConv2d.from_conv(conv)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_weights_lie_in_memory_as_those_of_conv2d_and_stay_so(format):
    conv = DynamicConv2d(4, 8, 3, out_groups=2)
    assert conv.weight.is_contiguous()
    conv.to(memory_format=format)
    copies = [
        conv, copy.deepcopy(conv), pickle.loads(pickle.dumps(conv)), copy.deepcopy(conv).half(), conv.to(torch.float64),
    ]  # fmt: skip
    for made in copies:
        assert made.weight.is_contiguous(memory_format=format)
        assert made.out_groups == (4, 4)
    conv.load_state_dict(nn.Conv2d(4, 8, 3).state_dict())
    assert conv.weight.is_contiguous(memory_format=format)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "slice": lambda t: torch.cat([t, t], 1).contiguous(memory_format=torch.channels_last)[:, : t.shape[1]],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda t: t[:, :, :1, :1].expand(t.shape),
}
SHAPES = {  # batch, channels in and out, size, kernel, cardinality
    "wide": (3, 16, 32, 5, 3, 1), "narrow": (3, 3, 6, 4, 3, 1), "pointwise": (2, 16, 16, 4, 1, 1),
    "one_channel_in": (2, 1, 4, 6, 3, 1), "one_channel_out": (2, 4, 1, 6, 3, 1), "one_pixel": (2, 16, 16, 1, 1, 1),
    "one_pixel_out": (2, 16, 16, 1, 3, 1), "depthwise": (2, 8, 8, 5, 3, 8), "one_instance": (1, 16, 16, 5, 3, 1),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_lie_in_memory_as_those_of_conv2d(shape, dtype):
    """Levels that select all, none and some: eager, with gradients, and as fake tensors."""
    B, C, O, size, kernel, cardinality = SHAPES[shape]
    groups = cardinality if cardinality > 1 else min(2, O) if O > 1 else 1
    for layout, weight_format in product(LAYOUTS, (torch.contiguous_format, torch.channels_last)):
        conv = DynamicConv2d(C, O, kernel, padding=kernel // 2, groups=cardinality, out_groups=groups)
        conv = conv.to(dtype).to(memory_format=weight_format)
        x = LAYOUTS[layout](torch.randn(B, C, size, size).to(dtype))
        for levels in (torch.full((B,), groups), torch.zeros(B, dtype=torch.int64), torch.arange(B) % (groups + 1)):
            with torch.no_grad():
                wanted = nn.functional.conv2d(x, conv.weight, conv.bias, 1, kernel // 2, 1, cardinality).stride()
                assert conv(x, levels).stride() == wanted, (layout, weight_format, levels)
            assert conv(x, levels).stride() == wanted, (layout, weight_format, levels)
            for leaf, made in zip((x, conv.weight), gradients(conv, x, levels), strict=True):
                format = memory_format_of(leaf)
                assert made.is_contiguous(memory_format=format), (layout, weight_format, levels)


def gradients(conv, x, levels):
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(conv(leaf, levels).sum(), [leaf, conv.weight])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_dtype_trains(dtype):
    conv = DynamicConv2d(4, 8, 3, out_groups=2).to(dtype)
    y = conv(torch.randn(4, 4, 5, 5, dtype=dtype), LEVELS)
    y.sum().backward()
    assert y.dtype == conv.weight.grad.dtype == dtype
    assert conv.weight.grad[4:].abs().sum() > 0
    assert torch.equal(conv.bias.grad, torch.tensor([27.0] * 4 + [18.0] * 4, dtype=dtype))


def test_repr_shows_the_groups():
    assert "out_groups=(2, 6), in_groups=(2, 2)" in repr(DynamicConv2d(4, 8, 3, out_groups=(2, 6), in_groups=2))
    assert "groups" not in repr(DynamicConv2d(4, 8, 3))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"out_groups": 3}, "out_groups must divide 8 channels"),
        ({"in_groups": (1, 1)}, "in_groups must be positive and add up to 4"),
        ({"out_groups": 2, "in_groups": 4}, "in_groups must have 2 groups"),
    ],
)
def test_groups_are_checked_when_the_layer_is_made(groups, message):
    with pytest.raises(ValueError, match=message):
        DynamicConv2d(4, 8, 3, **groups)


@pytest.mark.parametrize(("setting", "value"), [("stride", 0), ("padding", -1), ("dilation", 0)])
def test_settings_are_checked_when_the_layer_is_made(setting, value):
    with pytest.raises(ValueError, match=f"dynamic_conv2d: {setting} must be one or two integers of at least"):
        DynamicConv2d(8, 16, 3, out_groups=2, **{setting: value})


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "changed",
    [{"stride": (2, 2)}, {"padding": (1, 0)}, {"dilation": (2, 2)}, {"padding": "same"}, {"out_groups": (4, 12)}],
    ids=str,
)
def test_a_setting_that_changes_later_counts_and_so_does_its_return(changed, grad):
    torch.manual_seed(0)
    conv, x = DynamicConv2d(8, 16, 3, padding=1, out_groups=(8, 8)).train(grad), torch.randn(4, 8, 9, 9)
    original = {name: getattr(conv, name) for name in changed}
    with torch.set_grad_enabled(grad):
        for settings in ({}, changed, original):
            for name, value in settings.items():
                setattr(conv, name, value)
            keywords = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "out_groups")}
            expected = dynamic_conv2d_reference(x, conv.weight, conv.bias, LEVELS, **keywords)
            torch.testing.assert_close(conv(x, LEVELS), expected, rtol=1e-4, atol=1e-5)


def test_a_selection_needs_groups():
    with pytest.raises(ValueError, match="out_groups or in_groups must be set"):
        DynamicConv2d(4, 8, 3)(torch.zeros(4, 4, 5, 5), LEVELS)
