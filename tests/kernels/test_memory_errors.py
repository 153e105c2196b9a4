"""A kernel that gets no memory raises MemoryError, also inside its parallel regions, and the process goes on."""

import subprocess
import sys

import pytest

from den_kernels._extension import extension

pytestmark = pytest.mark.skipif(
    extension is None or not extension.has_direct_float32() or sys.platform != "linux",
    reason="needs the direct kernels and Linux's limit of address space",
)

# The first call starts the threads; then no more than a little memory may be taken.
PROGRAM = """
import resource, sys, torch
from den_kernels import DynamicConv2d, GraphWeights, RoutingPlan, dynamic_graph
from den_kernels._extension import extension
torch.set_num_threads(2)
torch.manual_seed(0)

def maps(B, C, side):
    return torch.randn(B, C, side, side).contiguous(memory_format=torch.channels_last)

def gradient(C, side):
    x, grad, dweight = maps(4, C, side), maps(4, C, side), torch.randn(C, C, 3, 3).to(memory_format=torch.channels_last)
    route = RoutingPlan.from_levels(torch.tensor([[0], [1], [2], [1]]), 2)[0]
    window = extension.Window((3, 3), (1, 1), (1, 1), (1, 1), (), (C // 2, C // 2))
    selected = 2, route.order, route.offsets, None
    return lambda: extension.dynamic_conv_weight_gradient(x, grad, dweight, selected, window)

def graph(states, C, side):
    edges = [(j - 1, j) for j in range(1, states)]
    weights = GraphWeights.pack(states, edges, [torch.randn(C, C, 3, 3)] * len(edges), [torch.randn(C)] * len(edges))
    plan, x, B = RoutingPlan.from_levels(torch.ones(4, len(edges), dtype=torch.int64), 1), maps(4, C, side), 4
    rows = torch.ones(B, states), torch.ones(B, len(edges)), torch.ones(B, states)
    out = torch.empty_like(x)
    handle, levels = weights.handle, plan.levels.t().contiguous()
    return lambda: handle(x, out, levels, *rows)

def plan(B):
    out = [torch.zeros(2, B, dtype=torch.int32), torch.zeros(2, B, dtype=torch.int32), torch.zeros(2, B + 1).int()]
    masks = torch.ones(2, B, 64, dtype=torch.bool)
    return lambda: extension.plan_masks(masks, *out)

small, large = {calls}
small()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), resource.RLIM_INFINITY))
try:
    large()
    print("no error")
except MemoryError:
    print("MemoryError")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
large()
print("goes on")
"""
CALLS = {
    "weight gradient": "gradient(16, 8), gradient(1024, 4)",
    "graph": "graph(2, 16, 4), graph(16, 32, 96)",
    "plan of masks": "plan(4096), plan(1 << 20)",
}


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_no_memory_is_a_memory_error(calls):
    run = subprocess.run([sys.executable, "-c", PROGRAM.replace("{calls}", calls)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:2] == ["MemoryError", "goes on"]
