"""One tap on maps of one pixel, a fully connected layer: products of matrices against the reference, and their rule."""

from types import SimpleNamespace

import pytest
import torch

from den_kernels import DynamicConv2d, _conv_cpu, _conv_direct, dynamic_conv2d
from den_kernels._geometry import Geometry
from den_kernels.dynamic_conv import dynamic_conv2d_reference
from den_kernels.testing import assert_as_accurate, make_levels, make_mask, masked_conv2d

GROUPS = (128, 128, 256)
SIDES = {
    "out": {"out_groups": GROUPS},
    "in": {"in_groups": GROUPS},
    "both": {"out_groups": GROUPS, "in_groups": GROUPS},
}
SELECTIONS = {
    "levels": lambda: make_levels("uniform", 6, 3),
    "all at the top": lambda: torch.full((6,), 3),
    "one at level 1": lambda: torch.tensor([0, 0, 1, 0, 0, 0]),
    "mask": lambda: make_mask(6, 3),
}


@pytest.fixture
def products(monkeypatch):
    """The shapes of the products that were made; a convolution is an error."""
    made = []
    monkeypatch.setattr(torch, "convolution", lambda *_: pytest.fail("oneDNN was called"))
    monkeypatch.setattr(_conv_direct, "forward", lambda *_: pytest.fail("the direct kernel was called"))
    linear = _conv_cpu.F.linear
    monkeypatch.setattr(_conv_cpu.F, "linear", lambda *given: made.append(given[0].shape) or linear(*given))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("select", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_products_equal_the_reference_with_gradients(sides, select, dtype, products, monkeypatch):
    given = [torch.randn(shape).to(dtype) for shape in ((6, 512, 1, 1), (512, 512, 1, 1), (512,))]
    dy, selection = torch.randn(6, 512, 1, 1).to(dtype), select()

    def run(op, given, dy, **keywords):
        leaves = [t.clone().requires_grad_() for t in given]
        y = op(*leaves, selection, **keywords)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy, materialize_grads=True, allow_unused=True)]

    got = run(dynamic_conv2d, given, dy, **sides)
    used = selection if selection.ndim == 2 else torch.arange(3) < selection[:, None]
    assert len(products) == len(used[used.any(1)].unique(dim=0))
    monkeypatch.undo()
    peers, sizes = run(masked_conv2d, given, dy, **sides), {"out_groups": (), "in_groups": ()} | sides
    exact = run(dynamic_conv2d_reference, [t.double() for t in given], dy.double(), **sizes)
    scales = run(dynamic_conv2d_reference, [t.double().abs() for t in given], dy.double().abs(), **sizes)
    for own, peer, true, scale in zip(got, peers, exact, scales, strict=True):
        assert_as_accurate(own, peer, true, scale)


def test_a_layer_of_many_weights_makes_products_when_the_batch_is_large(products):
    layer = DynamicConv2d(1024, 1024, 1, out_groups=4).eval()
    with torch.no_grad():
        y = layer(torch.randn(512, 1024, 1, 1), make_levels("uniform", 512, 4))
    assert y.shape == (512, 1024, 1, 1)
    assert len(products) == 4


@pytest.mark.parametrize(
    ("batch", "channels", "side", "packed", "direct"),
    [
        (16, 256, 1, False, True),
        (16, 512, 1, False, False),
        (16, 512, 2, False, True),
        (16, 512, 1, True, True),
        (2047, 512, 1, True, True),
        (2048, 512, 1, True, False),
    ],
)
def test_products_are_made_where_their_rule_says(batch, channels, side, packed, direct, monkeypatch):
    monkeypatch.setattr(_conv_direct, "extension", SimpleNamespace(has_direct_float32=lambda: True))
    geometry, weight = Geometry((1, 1), (0, 0), (1, 1), 1, (), ()), torch.zeros(channels, channels, 1, 1)
    x = torch.zeros(1, channels, side, side).to(memory_format=torch.channels_last).expand(batch, -1, -1, -1)
    weight = weight.to(memory_format=torch.channels_last)
    assert _conv_direct.runs_direct(x, weight, geometry, packed) == direct
