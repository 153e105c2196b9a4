"""What FlopCounterMode counts and a profiler shows: every op, whether or not it goes through torch.library."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from den_kernels import DynamicConv2d, RoutingPlan
from tests.call_kinds import GROUPS, LEVELS, MODULES, SAME, images, module

CONV = 2 * 16 * 16 * 9 * 36  # of one instance with all channels
SUM = int(LEVELS.sum())
MASKED = int(((LEVELS[:, None] + torch.arange(GROUPS)) % 3 == 1).sum())
WIDTHS = [(0, 2, 4, 8, 16)[level] for level in LEVELS.tolist()]  # of den's blocks
WANTED = {
    "conv": SUM * CONV // 4, "conv in": SUM * CONV // 4, "conv mask": MASKED * CONV // 4, "conv route": SUM * CONV // 4,
    "norm": 0, "norm of the batch": 0, "norm mask": 0, "block": 2 * sum(WIDTHS) * CONV // 16,
    "frozen block": 2 * sum(WIDTHS) * CONV // 16,
    "residual": 2 * SUM * CONV // 4, "residual in place": 2 * SUM * CONV // 4,
    "graph": int(LEVELS.clamp(max=3).sum()) * CONV, "plan of levels": 0, "plan of masks": 0,
}  # fmt: skip
BOTTLENECK = {"bottleneck": WIDTHS, "frozen bottleneck": WIDTHS}
BOTTLENECK |= {kind: [8 * level for level in LEVELS.tolist()] for kind in ("bottleneck op", "bottleneck op in place")}
BOTTLENECK["bottleneck op, composed"] = [6 * level for level in LEVELS.tolist()]
WANTED |= {name: sum(2 * 36 * (2 * 16 * m + 9 * m**2) for m in widths) for name, widths in BOTTLENECK.items()}
INVERTED = ("inverted residual", "inverted residual in place")
WANTED |= dict.fromkeys(INVERTED, sum(2 * 8 * level * (36 * (16 + 9 + 16) + 4 + 4) for level in LEVELS.tolist()))
RANGES = {
    "conv": "dynamic_conv2d", "norm": "dynamic_norm", "block": "dynamic_residual", "residual": "dynamic_residual",
    "residual in place": "dynamic_residual_", "graph": "dynamic_graph", "bottleneck": "dynamic_bottleneck",
    "frozen bottleneck": "dynamic_bottleneck", "bottleneck op in place": "dynamic_bottleneck_",
    "inverted residual": "dynamic_inverted_residual", "inverted residual in place": "dynamic_inverted_residual_",
    "plan of levels": "plan_levels", "plan of masks": "plan_masks",
}  # fmt: skip


def flops(function, *arguments):
    with FlopCounterMode(display=False) as mode:
        function(*arguments)
    return mode.get_total_flops()


@pytest.mark.parametrize("name", MODULES)
def test_flops_of_the_selected_part(name):
    function = module(name)
    with torch.no_grad():
        assert flops(function, images(), LEVELS) == WANTED[name]


@pytest.mark.parametrize("inside", ["both", "backward"])
@pytest.mark.parametrize("name", ["conv", "conv mask"])
def test_flops_of_a_backward_pass(name, inside):
    function, x = module(name), images().requires_grad_()
    loss = lambda: function(x, LEVELS).square().sum()  # noqa: E731
    if inside == "both":
        assert flops(lambda: loss().backward()) == 3 * WANTED[name]
    else:
        assert flops(loss().backward) == 2 * WANTED[name]
    function.requires_grad_(False)
    assert flops(lambda: loss().backward()) == 2 * WANTED[name]


def test_all_channels_count_as_the_ordinary_convolution_does():
    for keywords in ({}, {"stride": 2}, {"groups": 4}, {"dilation": 2, "bias": False}):
        conv, x = DynamicConv2d(16, 32, 3, padding=1, **keywords, out_groups=4), images()
        whole = flops(conv, x)
        assert whole == flops(nn.Conv2d(16, 32, 3, padding=1, **keywords), x) > 0
        assert flops(conv, x, torch.full((4,), 4)) == whole
        assert flops(conv, x, torch.full((4,), 1)) == whole // 4
        assert flops(conv, x, torch.zeros(4, dtype=torch.int64)) == 0


def test_an_output_without_inputs_is_free():
    conv = DynamicConv2d(16, 16, 3, groups=4, in_groups=4)
    assert flops(conv, images(), torch.zeros(4, dtype=torch.int64)) == 0


@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_levels_that_are_not_known_count_as_the_highest(kind):
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        conv = DynamicConv2d(16, 16, **SAME, out_groups=4)
        x, levels = torch.empty(4, 16, 6, 6), torch.zeros(4, dtype=torch.int64)
        route = RoutingPlan.from_levels(levels[:, None], 4)[0]
        assert flops(conv, x, route) == 4 * CONV


@pytest.mark.parametrize("name", RANGES)
def test_a_profiler_shows_the_ops(name):
    function = module(name)
    with torch.no_grad():
        wanted = function(images(), LEVELS)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            found = function(images(), LEVELS)
    assert torch.equal(found, wanted)  # what is profiled is what runs without a profiler
    assert f"den_kernels::{RANGES[name]}" in {event.key for event in seen.key_averages()}


@pytest.mark.parametrize("name", ["conv", "norm"])
def test_a_profiler_shows_the_backward_pass(name):
    function, x = module(name), images().requires_grad_()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        function(x, LEVELS).square().sum().backward()
    shown = {event.key for event in seen.key_averages()}
    assert {f"den_kernels::{RANGES[name]}", f"den_kernels::{RANGES[name]}_backward"} <= shown


@pytest.mark.parametrize("first", ["den_kernels", "torch.utils.flop_counter"])
def test_formulas_are_there_whichever_module_is_imported_first(first):
    program = f"""
import sys, importlib
import {first}
import den_kernels, torch
if {first!r} == "den_kernels":
    assert "torch.utils.flop_counter" not in sys.modules and "triton" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
assert not any(type(finder).__module__ == "den_kernels._on_import" for finder in sys.meta_path)
conv = den_kernels.DynamicConv2d(4, 4, 1, out_groups=2)
with FlopCounterMode(display=False) as counter, torch.no_grad():
    conv(torch.zeros(2, 4, 3, 3), torch.tensor([1, 2]))
print(counter.get_total_flops())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == 2 * 9 * 4 * (2 + 4)
