"""The float32 kernels of a CPU in each instruction set that it has, and in none; the other tests use the best."""

import pytest
import torch

from den_kernels import RoutingPlan, dynamic_conv2d, dynamic_graph, dynamic_residual, info
from den_kernels._extension import extension
from den_kernels.dynamic_conv import dynamic_conv2d_reference
from den_kernels.testing import float32_limited_to, make_levels, make_mask
from tests.kernels import test_dynamic_bottleneck as bottleneck
from tests.kernels import test_dynamic_graph as graphs
from tests.kernels import test_dynamic_residual as residual

pytestmark = pytest.mark.skipif(
    extension is None or not extension.has_direct_float32(), reason="needs the extension on a CPU with AVX2"
)
SETS = ("AVX2", "AVX-512")
SELECTIONS = {"levels": make_levels("uniform", 7, 3), "mask": make_mask(7, 3)}
CONVS = {  # channels, groups of outputs, groups of inputs, map, settings
    "even rows": (16, (16, 16, 16), (), (6, 8), {}),
    "odd rows, parts of vectors": (24, (5, 8, 12), (), (5, 7), {}),
    "one column": (16, (8, 8, 8), (), (9, 1), {}),
    "elastic inputs": (40, (), (8, 12, 20), (7, 7), {"stride": 2}),
    "both, dilated": (36, (4, 16, 12), (13, 16, 7), (8, 6), {"dilation": 2, "padding": 2}),
}
BLOCKS = {  # arguments of the block, map
    "packed": ({"channels": 32, "groups": (16, 32, 16)}, (8, 8)),
    "odd rows, strided": ({"channels": 128, "groups": (3, 8, 21), "stride": 2, "out_channels": 144}, (7, 9)),
    "by pixels": ({"channels": 16, "groups": (1, 2, 5)}, (5, 16)),
    "1 x 1": ({"channels": 16, "groups": (4, 4, 4), "kernel": (1, 1)}, (3, 5)),
}


@pytest.fixture(params=SETS)
def isa(request):
    with float32_limited_to(request.param):
        if extension.float32_isa() != request.param:
            pytest.skip(f"this CPU has no {request.param}")
        yield request.param


def conv_case(name):
    C, outs, ins, side, settings = CONVS[name]
    weight, bias = torch.randn(sum(outs) or 20, C, 3, 3) / C**0.5, torch.randn(sum(outs) or 20)
    x = torch.randn(7, C, *side).contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    return (x, weight, bias), {"padding": 1, "out_groups": outs or None, "in_groups": ins or None} | settings


@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize("name", CONVS)
def test_convolution_and_its_gradients(name, kind, isa):
    tensors, settings = conv_case(name)

    def run(op, dtype, settings):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        y = op(*leaves, SELECTIONS[kind], **settings)
        gradients = torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y))
        return [y.detach(), *gradients]

    as_sizes = {key: () if value is None else value for key, value in settings.items()}
    got, exact = run(dynamic_conv2d, torch.float32, settings), run(dynamic_conv2d_reference, torch.float64, as_sizes)
    terms = max(tensors[1][0].numel(), got[0].numel() // got[0].shape[1])  # of an output, of a weight's gradient
    for each, wanted in zip(got, exact, strict=True):  # rounding errors that add up at random
        bound = 2 * terms**0.5 * torch.finfo(torch.float32).eps * wanted.abs().max()
        assert (each - wanted).abs().max() <= bound


@pytest.mark.parametrize("copy", [True, False], ids=["packed", "where they are"])
@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize("name", BLOCKS)
def test_residual_block(name, kind, copy, isa, monkeypatch):
    monkeypatch.setattr(residual.residual_weights, "_WIDE", (0, 0))
    block, side = BLOCKS[name]
    block = residual.Block(**block)
    residual.check(block, residual.image(7, block.conv1.in_channels, *side), SELECTIONS[kind], copy)


@pytest.mark.parametrize("shape", [(32, 48, 32, 8, 1, 1), (16, 64, 48, 7, 2, 1)], ids=str)
@pytest.mark.parametrize("kind", ["uniform", "mask"])
def test_bottleneck_block(kind, shape, isa):
    block, side = bottleneck.make(*shape), shape[3]
    bottleneck.check(block, bottleneck.images(block, 5, (side, side)), bottleneck.route_of(kind, 5))


@pytest.mark.parametrize("side", [(7, 7), (8, 4)], ids=str)
def test_graph(side, isa):
    graphs.check(graphs.graph_of(40), *graphs.case(5, 40, side))


def test_all_sets_give_the_same_bits():
    """What one pixel and one output add up, and in which order, depends on no tile."""
    (x, weight, bias), settings = conv_case("odd rows, parts of vectors")
    block, graph = residual.Block(32, (16, 8, 24)), graphs.graph_of(24)
    (maps, levels, *rows), image = graphs.case(5, 24, (6, 7)), residual.image(7, 32, 6, 7)
    weights, plan = block.fold(), RoutingPlan.from_levels(levels, 1)
    results = []
    for isa in SETS:
        with float32_limited_to(isa):
            results.append(
                [
                    dynamic_conv2d(x, weight, bias, SELECTIONS["mask"], **settings),
                    dynamic_residual(image, SELECTIONS["levels"], weights),
                    dynamic_graph(maps, graph, plan, *rows),
                ]
            )
    assert all(map(torch.equal, *results))


def test_none_of_them_leaves_the_work_to_onednn():
    block, x, levels = residual.Block(32, (16, 16)), residual.image(4, 32, 5, 5), torch.tensor([0, 1, 2, 1])
    packed = block.fold()
    best = extension.float32_isa()
    with float32_limited_to(""):
        assert not extension.has_direct_float32()
        assert "in float32" not in info.describe()["implementations"]["cpu"]["dynamic convolution"]
        weights = block.fold()
        assert weights.direct is None
        torch.testing.assert_close(dynamic_residual(x, levels, weights), block(x, residual.chosen(levels, 2)))
        with pytest.raises(RuntimeError, match="dynamic_residual: this CPU has no AVX2, or float32"):
            dynamic_residual(x, levels, packed)
    assert extension.float32_isa() == best


def test_an_unknown_set_is_refused():
    with pytest.raises(ValueError, match='isa must be "AVX-512", "AVX2" or "", got "AVX3"'), float32_limited_to("AVX3"):
        pass
