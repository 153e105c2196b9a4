"""Inference of a layer that has packed its weight (`DynamicConv2d._ready`): as the function computes and refuses."""

from dataclasses import replace

import pytest
import torch

from den_kernels import DynamicConv2d
from den_kernels.dynamic_conv import dynamic_conv2d
from den_kernels.plan import as_route
from tests.kernels.test_conv_direct import DTYPES, channels_last


@DTYPES
@pytest.mark.parametrize("given", ["levels", "mask", "route", "masks' route"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("changes", [{}, {"stride": 2}, {"padding": 0}, {"padding": "same"}, {"padding": 3}], ids=str)
def test_a_layer_that_has_packed_computes_the_same(changes, bias, given, dtype):
    """A later call of inference gives the bits of the function, whatever the selection is given as."""
    torch.manual_seed(0)
    conv = DynamicConv2d(16, 32, 3, bias=bias, out_groups=(8, 24), **({"padding": 1} | changes)).eval().to(dtype)
    x, levels = channels_last(torch.randn(5, 16, 9, 8)).to(dtype), torch.tensor([1, 0, 2, 2, 1])
    selection = levels[:, None] > torch.arange(2) if "mask" in given else levels
    if "route" in given:
        selection = as_route(selection, 2, 5)
    settings = {"stride": conv.stride, "padding": conv.padding, "out_groups": (8, 24)}
    with torch.no_grad():
        expected = dynamic_conv2d(x, conv.weight, conv.bias, selection, **settings)
        for _ in range(3):
            assert torch.equal(conv(x, selection), expected)


@DTYPES
def test_a_layer_that_has_packed_notices_every_change(dtype):
    """New settings, another batch, layout or type, all instances at the highest level, weights of another shape."""
    conv, levels = DynamicConv2d(16, 32, 3, padding=1, out_groups=2).eval().to(dtype), torch.tensor([1, 0, 2])
    x = channels_last(torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0))).to(dtype)

    def agrees(x, levels):
        settings = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        with torch.no_grad():
            expected = dynamic_conv2d(x, conv.weight, conv.bias, levels, out_groups=conv.out_groups, **settings)
            got = conv(x, levels)
            torch.testing.assert_close(got, expected)
            return got.stride() == expected.stride()

    assert agrees(x, levels)
    assert agrees(x[:2], levels[:2])
    assert agrees(x[:0], levels[:0])
    assert agrees(x.contiguous(), levels)
    assert agrees(x, torch.full((3,), 2))
    for name, value in (("stride", (2, 1)), ("padding", (0, 1)), ("dilation", (1, 2)), ("out_groups", (16, 8, 8))):
        setattr(conv, name, value)
        assert agrees(x, levels)
    conv.weight = torch.nn.Parameter(torch.ones(32, 16, 1, 1, dtype=dtype))
    assert agrees(x, levels)


def test_a_layer_that_has_packed_refuses_what_it_always_refused():
    conv, x = DynamicConv2d(16, 32, 3, padding=1, out_groups=2).eval(), channels_last(torch.randn(3, 16, 8, 8))
    levels = torch.tensor([1, 0, 2])
    with torch.no_grad():
        for _ in range(2):
            conv(x, levels)
        for wrong, selection, error, words in (
            (x[:, :8], levels, ValueError, "x must have 16 channels, got 8"),
            (x[0], levels, ValueError, "must have four axes"),
            (x.double(), levels, TypeError, "weight must be torch.float64"),
            (x, levels[:2], ValueError, r"levels must be \[3\], got \[2\]"),
            (x, levels + 1, ValueError, "in 0..2"),
            (x, levels.float(), TypeError, "selection"),
            (x, as_route(levels, 3, 3), ValueError, "groups must be 2, got 3"),
            (x, as_route(levels, 2, 3).active(), ValueError, "groups must be 2, got 1"),
            (x, replace(as_route(levels, 2, 3), order=levels.int() + 1), ValueError, "instances of the batch"),
            (x[:, :, :0], levels, ValueError, "must fit the padded map"),
        ):
            with pytest.raises(error, match=words):
                conv(wrong, selection)
