"""A graph of gated convolutions as a GPU runs it, against its reference."""

import pytest
import torch

from den_kernels import GraphWeights, RoutingPlan
from den_kernels._triton import convolve
from den_kernels._triton.graph import run_graph
from den_kernels.dynamic_graph import dynamic_graph_reference

EDGES = ((0, 1), (0, 2), (1, 2))


@pytest.mark.parametrize(("arch", "dtype"), [(80, torch.float32), (90, torch.bfloat16)], ids=["pointers", "boxes"])
def test_a_gated_sum_of_what_each_instance_keeps(arch, dtype, monkeypatch):
    monkeypatch.setattr(convolve, "architecture", lambda device: (arch, 2))
    torch.manual_seed(0)
    x = torch.randn(3, 16, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    weights = [(torch.randn(16, 16, 3, 3) / 12).to(dtype) for _ in EDGES]
    graph = GraphWeights.pack(3, EDGES, weights, [torch.randn(16).to(dtype) for _ in EDGES])
    levels = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0]])
    plan = RoutingPlan.from_levels(levels, 1)
    gates = torch.randn(3, 3).to(dtype)
    gates[1, 0] = gates[2] = torch.nan  # of edges that are not kept
    read_in, read_out = torch.rand(3, 3).to(dtype), torch.rand(3, 3).to(dtype)
    got = run_graph(x, graph.edges, graph.weights, graph.biases, plan, read_in, gates, read_out)
    wide = GraphWeights(3, EDGES, *(tuple(t.double() for t in ts) for ts in (graph.weights, graph.biases)))
    expected = dynamic_graph_reference(x.double(), wide, levels, *(t.double() for t in (read_in, gates, read_out)))
    tolerance = 1e-4 if dtype == torch.float32 else 0.08
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    assert got.is_contiguous(memory_format=torch.channels_last)
