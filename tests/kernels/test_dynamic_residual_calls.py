"""The residual block as an op and compiled, the rules that choose its kernel, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from den_kernels import (
    ResidualWeights,
    RoutingPlan,
    dynamic_residual,
    dynamic_residual_,
    residual_weights,
)
from den_kernels._residual_gpu import masked_branch
from den_kernels.rows import pool_rows
from den_kernels.testing import make_levels, make_mask
from tests.kernels.test_dynamic_residual import CASES, Block, image


def operands(block, x, selection):
    from den_kernels.dynamic_residual import OPERANDS
    from den_kernels.plan import as_route

    weights = block.fold()
    return OPERANDS.of(as_route(selection, len(block.groups), x.shape[0]), weights)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, masks):
    block, x = Block(16, (8, 8)).to(dtype), image(3, 16, 6, 6, dtype=dtype)
    selection = make_mask(3, 2) if masks else torch.tensor([2, 0, 1])
    torch.library.opcheck(torch.ops.den_kernels.dynamic_residual, (x, *operands(block, x, selection)))
    torch.library.opcheck(torch.ops.den_kernels.dynamic_residual_, (x, *operands(block, x, selection)))
    halving = Block(16, (8, 16), out_channels=32, stride=2).to(dtype)
    torch.library.opcheck(torch.ops.den_kernels.dynamic_residual, (x, *operands(halving, x, selection)))


@pytest.mark.parametrize("case", ["wrn-stage1", "stride 2", "odd channels"])
def test_compile_as_one_graph(case):
    make, shape = CASES[case]
    weights, x = Block(**make).fold(), image(*shape)
    levels = make_levels("uniform", shape[0], len(weights.groups))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x, levels):
        return dynamic_residual(x, levels, weights) * 2, dynamic_residual_(x + 0, levels, weights)

    with torch.no_grad():
        doubled, plain = run(x, levels)
    expected = dynamic_residual(x, levels, weights)
    torch.testing.assert_close(doubled, expected * 2)
    torch.testing.assert_close(plain, expected)


def test_routes_of_a_plan_are_shared():
    weights, x = Block(32, (16, 16)).fold(), image(4, 32, 6, 6)
    levels = torch.tensor([[2, 0], [1, 1], [0, 2], [2, 2]])
    plan = RoutingPlan.from_levels(levels, 2)
    for n in range(2):
        assert torch.equal(dynamic_residual(x, plan[n], weights), dynamic_residual(x, levels[:, n], weights))


def test_masked_composition_of_other_devices_agrees():
    from den_kernels.plan import as_route

    for case in ("wrn-stage1", "stride 2", "first block", "biases"):
        make, shape = CASES[case]
        weights, x = Block(**make).fold(), image(*shape)
        for selection in (
            make_levels("uniform", shape[0], len(weights.groups)),
            make_mask(shape[0], len(weights.groups)),
        ):
            route = as_route(selection, len(weights.groups), shape[0])
            out = pool_rows(x, weights.conv2.shape[0], weights.stride)
            out.add_(masked_branch(x, route, weights))
            torch.testing.assert_close(out, dynamic_residual(x, selection, weights), rtol=1e-5, atol=1e-5)


def test_segments_and_chunks_are_pure_functions_of_the_arguments():
    from den_kernels._residual_cpu import chunk_size
    from den_kernels.rows import segments

    plan = RoutingPlan.from_levels(torch.tensor([[2], [0], [3], [2]]), 3)
    assert segments(plan[0]) == [(0, 1, (True, True, True)), (1, 3, (True, True, False)), (3, 4, (False,) * 3)]
    masks = torch.tensor([[0, 1], [1, 0], [0, 0], [0, 1]]).bool()[:, None]
    assert segments(RoutingPlan.from_masks(masks)[0]) == [
        (0, 1, (True, False)),
        (1, 3, (False, True)),
        (3, 4, (False, False)),
    ]
    assert chunk_size(3, 1 << 30) == 3
    assert chunk_size(100, 1 << 30) == 8
    assert chunk_size(100, 1) == 100


BLOCK = [32, 64, 3, 3], [64, 32, 3, 3]
RULE = {
    "float32": ("cpu", torch.float32, BLOCK, True),
    "bfloat16": ("cpu", torch.bfloat16, BLOCK, True),
    "float16": ("cpu", torch.float16, BLOCK, False),
    "float64": ("cpu", torch.float64, BLOCK, False),
    "another device": ("cuda", torch.float32, BLOCK, False),
    "odd channels in": ("cpu", torch.bfloat16, ([32, 20, 3, 3], [64, 32, 3, 3]), False),
    "odd channels out": ("cpu", torch.float32, ([32, 16, 3, 3], [20, 32, 3, 3]), False),
    "odd hidden channels": ("cpu", torch.bfloat16, ([13, 16, 3, 3], [16, 13, 3, 3]), True),
    "kernel too large": ("cpu", torch.float32, ([32, 16, 9, 9], [16, 32, 9, 9]), False),
    "different kernels": ("cpu", torch.float32, ([32, 16, 3, 3], [16, 32, 1, 1]), False),
}


@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("case", RULE)
def test_the_direct_kernel_runs_where_its_rule_says(case, able, monkeypatch):
    device, dtype, shapes, expected = RULE[case]
    has = dict.fromkeys(("has_direct_float32", "has_direct_bf16"), lambda: able)
    monkeypatch.setattr(residual_weights, "extension", SimpleNamespace(**has))
    assert residual_weights.runs_direct(torch.device(device), dtype, *shapes) == (expected and able)
    monkeypatch.setattr(residual_weights, "extension", None)
    assert not residual_weights.runs_direct(torch.device(device), dtype, *shapes)


def conv(*arguments, **keywords):
    return nn.Conv2d(*arguments, **{"padding": 1, **keywords})


BAD_WEIGHTS = {
    "padding": (conv(16, 16, 3, padding=0), conv(16, 16, 3), "conv1 must have"),
    "even kernel": (conv(16, 16, 2), conv(16, 16, 3), "conv1 must have"),
    "dilation": (conv(16, 16, 3, dilation=2, padding=2), conv(16, 16, 3), "conv1 must have"),
    "cardinality": (conv(16, 16, 3, groups=2), conv(16, 16, 3), "conv1 must have"),
    "stride of conv2": (conv(16, 16, 3), conv(16, 16, 3, stride=2), "conv2 must have stride 1, got 2"),
    "channels": (conv(16, 16, 3), conv(32, 16, 3), "conv2 must take conv1's 16 channels"),
    "fewer channels out": (conv(16, 16, 3), conv(16, 8, 3), "give at least 16"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_blocks_that_cannot_be_folded(case):
    conv1, conv2, message = BAD_WEIGHTS[case]
    with pytest.raises(ValueError, match=message):
        ResidualWeights.fold(conv1, None, conv2, nn.BatchNorm2d(conv1.out_channels))


def test_batch_norm_without_running_statistics_cannot_be_folded():
    with pytest.raises(ValueError, match="bn2 must track running statistics"):
        ResidualWeights.fold(conv(16, 16, 3), None, conv(16, 16, 3), nn.BatchNorm2d(16, track_running_stats=False))


BAD_INPUTS = {
    "rank": (image(2, 16, 4, 4)[0], torch.tensor([1, 2]), ValueError, r"x must be \[B, 16, H, W\]"),
    "channels": (image(2, 8, 4, 4), torch.tensor([1, 2]), ValueError, r"x must be \[B, 16, H, W\]"),
    "no rows": (image(2, 16, 0, 4), torch.tensor([1, 2]), ValueError, "H and W of at least 1"),
    "no columns": (image(2, 16, 4, 0), torch.tensor([1, 2]), ValueError, "H and W of at least 1"),
    "dtype": (
        image(2, 16, 4, 4, dtype=torch.bfloat16),
        torch.tensor([1, 2]),
        TypeError,
        "must be torch.float32 as the weights are",
    ),
    "device": (torch.empty(2, 16, 4, 4, device="meta"), torch.tensor([1, 2]), ValueError, "x must be on cpu"),
    "level out of range": (image(2, 16, 4, 4), torch.tensor([1, 3]), ValueError, "levels must be in 0..2, got 3"),
    "number of levels": (image(2, 16, 4, 4), torch.tensor([1]), ValueError, r"levels must be \[2\]"),
    "floating levels": (image(2, 16, 4, 4), torch.tensor([1.0, 2.0]), TypeError, "integer"),
    "mask width": (image(2, 16, 4, 4), torch.ones(2, 3).bool(), ValueError, r"mask must be \[2, 2\]"),
    "gradient": (image(2, 16, 4, 4).requires_grad_(), torch.tensor([1, 2]), ValueError, "must not require a gradient"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input(case):
    x, selection, error, message = BAD_INPUTS[case]
    with pytest.raises(error, match=message):
        dynamic_residual(x, selection, Block(16, (8, 8)).fold())
