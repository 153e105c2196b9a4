"""The gated sum of a graph of convolutions: in one C++ call, and edge by edge, against the loops of the reference."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import den_kernels._conv_direct as direct
from den_kernels import GraphWeights, RoutingPlan, dynamic_graph
from den_kernels.dynamic_graph import dynamic_graph_reference, run_masked
from den_kernels.graph_weights import MOST_BYTES, STATES_BYTES
from tests.fuzz import examples

EDGES = ((0, 1), (0, 2), (1, 2), (1, 3), (2, 3))
STATES = 4


def graph_of(channels, kernel=(3, 3), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(channels, channels, *kernel, generator=generator) / (9 * channels) ** 0.5 for _ in EDGES]
    biases = [torch.randn(channels, generator=generator) for _ in EDGES]
    return GraphWeights.pack(STATES, EDGES, [w.to(dtype) for w in weights], [b.to(dtype) for b in biases])


def case(batch, channels, side, seed=1, dtype=torch.float32):
    """x, levels, read-in, gates and read-out: about half of everything is kept."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, *side, generator=generator).contiguous(memory_format=torch.channels_last)
    levels = torch.randint(2, (batch, len(EDGES)), generator=generator)
    rows = [torch.rand(batch, width, generator=generator) for width in (STATES, len(EDGES), STATES)]
    rows[0][:, 2], rows[2][:, 0] = 0, 0
    return x.to(dtype), levels, *(row.to(dtype) for row in rows)


def without_direct(graph):
    return dataclasses.replace(graph, direct=())


def check(graph, x, levels, *rows):
    """As far from float64 as sums of that many products in any order: rounding errors that add up at random."""
    plan = RoutingPlan.from_levels(levels, 1)
    precise = GraphWeights.pack(STATES, EDGES, [w.double() for w in graph.weights], [b.double() for b in graph.biases])
    wanted = dynamic_graph_reference(x.double(), precise, levels, *(row.double() for row in rows))
    terms = graph.weights[0][0].numel() * len(EDGES)
    bound = 2 * terms**0.5 * torch.finfo(x.dtype).eps * (wanted.abs().max() if len(x) else 1)
    for each in (graph, without_direct(graph)):
        got = dynamic_graph(x, each, plan, *rows)
        assert got.shape == x.shape
        assert got.dtype == x.dtype
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert not len(x) or (got - wanted).abs().max() <= bound


@pytest.mark.parametrize("channels", [1, 15, 16, 24, 33, 48, 63])
@pytest.mark.parametrize("side", [(7, 7), (8, 5), (1, 1), (3, 14)])
def test_equals_the_loops(channels, side):
    check(graph_of(channels), *case(5, channels, side))


@examples(40)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    states=st.integers(2, 5),
    chosen=st.integers(1, 2**10 - 1),
    channels=st.integers(1, 70),
    kernel=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 7])),
    side=st.tuples(st.integers(1, 15), st.integers(1, 15)),
    batch=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_any_graph_equals_the_loops(dtype, states, chosen, channels, kernel, side, batch, seed):
    """Edges: those of all pairs whose bits `chosen` has, at least one."""
    pairs = [(i, j) for j in range(states) for i in range(j)]
    edges = [pair for bit, pair in enumerate(pairs) if chosen >> bit & 1] or pairs[:1]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    terms = channels * kernel[0] * kernel[1]
    weights = [(random(channels, channels, *kernel) / terms**0.5).to(dtype) for _ in edges]
    biases = [random(channels).to(dtype) for _ in edges]
    x = random(batch, channels, *side).contiguous(memory_format=torch.channels_last).to(dtype)
    levels = torch.randint(2, (batch, len(edges)), generator=generator)
    rows = [random(batch, width).to(dtype) for width in (states, len(edges), states)]
    precise = GraphWeights.pack(states, edges, [w.double() for w in weights], [b.double() for b in biases])
    wanted = dynamic_graph_reference(x.double(), precise, levels, *(row.double() for row in rows))
    graph = GraphWeights.pack(states, edges, weights, biases)
    for each in (graph, without_direct(graph)):
        got = dynamic_graph(x, each, RoutingPlan.from_levels(levels, 1), *rows)
        assert (got.dtype, got.shape) == (dtype, x.shape)
        if len(x):  # each state is rounded, and the errors of one go through all the edges behind it
            bound = 4 * (states + 1) * (terms**0.5 + 2) * torch.finfo(dtype).eps * max(1.0, wanted.abs().max().item())
            assert (got.double() - wanted).abs().max() <= bound


@pytest.mark.parametrize("kernel", [(1, 1), (3, 1), (5, 5), (7, 7)])
def test_any_odd_kernel(kernel):
    check(graph_of(16, kernel), *case(3, 16, (6, 9)))


@pytest.mark.parametrize("batch", [0, 1, 2, 17])
def test_any_batch(batch):
    check(graph_of(16), *case(batch, 16, (7, 7)))


@pytest.mark.parametrize("level", [0, 1])
def test_all_edges_and_none(level):
    x, levels, *rows = case(4, 16, (7, 7))
    check(graph_of(16), x, torch.full_like(levels, level), *rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_run_edge_by_edge(dtype):
    graph, (x, levels, *rows) = graph_of(16, dtype=dtype), case(5, 16, (7, 7), dtype=dtype)
    assert not graph.direct
    got = dynamic_graph(x, graph, RoutingPlan.from_levels(levels, 1), *rows)
    torch.testing.assert_close(got, dynamic_graph_reference(x, graph, levels, *rows).to(dtype), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("whole", [True, False])
def test_what_an_instance_does_not_keep_is_not_run(whole):
    """Weights that are NaN reach only the instances that keep their edge; a NaN image stays in its own row."""
    graph = graph_of(16)
    graph.weights[3].fill_(torch.nan)
    graph = GraphWeights.pack(STATES, EDGES, graph.weights, graph.biases)
    x, levels, *rows = case(6, 16, (7, 7))
    levels[:, 3] = torch.tensor([1, 0, 0, 1, 0, 0])
    x[1] = torch.nan
    got = dynamic_graph(x, graph if whole else without_direct(graph), RoutingPlan.from_levels(levels, 1), *rows)
    assert got.isnan().flatten(1).any(1).tolist() == [True, True, False, True, False, False]


def test_scratch_memory_of_other_shapes_leaves_no_trace():
    large, small = (graph_of(c) for c in (48, 16))
    for _ in range(2):
        check(large, *case(4, 48, (9, 9)))
        check(small, *case(4, 16, (7, 7)))


@pytest.mark.skipif(
    direct.extension is None or not direct.extension.has_direct_float32(), reason="needs the extension and AVX2"
)
def test_one_call_runs_what_fits_the_cache_and_large_maps_of_enough_instances(monkeypatch):
    graph = graph_of(16)
    assert graph.runs_whole(torch.empty(9, 16, 7, 7))
    side = int((STATES_BYTES / (4 * STATES * 16)) ** 0.5) + 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert not graph.runs_whole(torch.empty(3, 16, side, side))
    assert graph.runs_whole(torch.empty(4, 16, side, side))
    assert not graph.runs_whole(torch.empty(1, 16, 7, 7, dtype=torch.bfloat16))
    huge = int((MOST_BYTES / (4 * STATES * 16)) ** 0.5) + 1
    assert not graph.runs_whole(torch.empty(4, 16, huge, huge, device="meta"))


@pytest.mark.parametrize(("channels", "size"), [(16, (150, 140)), (20, (300, 61))])
def test_maps_beyond_the_cache_are_computed_in_bands_of_rows(monkeypatch, channels, size):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # the work of one thread for each instance
    check(graph_of(channels), *case(1, channels, size))


def test_without_the_extension_edges_run_one_by_one(monkeypatch):
    monkeypatch.setattr(direct, "extension", None)
    assert not graph_of(16).direct
    check(graph_of(16), *case(4, 16, (7, 7)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": ((1, 0),) * 5}, r"edges must be \(i, j\) with 0 <= i < j < 4"),
        ({"edges": ((0, 3), (0, 1), (1, 2), (1, 3), (2, 3))}, "in the order of j"),
        ({"edges": ((0, 1), (0, 4), (1, 4), (1, 4), (2, 4))}, "< 4"),
        ({"weights": 4}, "one for each of the 5 edges, at least one, got 4 and 5"),
        ({"shape": (8, 8, 2, 3)}, r"weights must be \[C, C, R, S\] with odd R and S, got \[8, 8, 2, 3\]"),
        ({"shape": (8, 4, 3, 3)}, r"weights must be \[C, C, R, S\]"),
        ({"bias": 7}, r"weights must all be \[8, 8, 3, 3\], and biases \[8\]"),
        ({"dtype": torch.bfloat16}, "must all be torch.float32 on cpu, got torch.bfloat16 on cpu"),
    ],
)
def test_graphs_that_do_not_fit_are_refused(changes, message):
    weights = [torch.zeros(changes.get("shape", (8, 8, 3, 3)))] * changes.get("weights", 5)
    biases = [torch.zeros(changes.get("bias", 8), dtype=changes.get("dtype"))] * 5
    with pytest.raises(ValueError, match=f"dynamic_graph: .*{message}"):
        GraphWeights.pack(STATES, changes.get("edges", EDGES), weights, biases)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(3, 9, 7, 7), r"x must be \[B, 8, H, W\] .*, got \[3, 9, 7, 7\]"),
        (0, torch.zeros(3, 8, 7, 0), r"x must be .* H and W of at least 1, got \[3, 8, 7, 0\]"),
        (0, torch.zeros(3, 8, 7, 7, dtype=torch.float64), "read_in must be torch.float64 on cpu"),
        (1, torch.ones(2, 5, dtype=torch.int64), "plan must hold 5 blocks of one group for 3 instances"),
        (1, torch.ones(3, 4, dtype=torch.int64), "plan must hold 5 blocks"),
        (2, torch.zeros(3, 5), r"read_in must be \[3, 4\], got \[3, 5\]"),
        (3, torch.zeros(3, 4), r"gates must be \[3, 5\]"),
        (4, torch.zeros(2, 4), r"read_out must be \[3, 4\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(index, value, message):
    arguments = list(case(3, 8, (7, 7)))
    arguments[index] = value
    x, levels, *rows = arguments
    with pytest.raises(ValueError, match=f"dynamic_graph: {message}"):
        dynamic_graph(x, graph_of(8), RoutingPlan.from_levels(levels, 1), *rows)


def test_on_a_gpu_without_triton_whole_batches_run():
    graph, (x, levels, *rows) = graph_of(8), case(3, 8, (5, 4))
    rows[1][levels == 0] = torch.nan  # gates of edges that are not kept
    got = run_masked(x, graph, RoutingPlan.from_levels(levels, 1), *rows)
    torch.testing.assert_close(got, dynamic_graph_reference(x, graph, levels, *rows), rtol=1e-5, atol=1e-5)


def test_a_plan_made_from_masks():
    graph, (x, levels, *rows) = graph_of(16), case(5, 16, (6, 6))
    levels[:, 1] = 0  # an edge that nobody keeps has one segment, as one that all keep
    levels[:, 2] = 1
    plan = RoutingPlan.from_masks(levels[:, :, None] > 0)
    for each in (graph, without_direct(graph)):
        wanted = dynamic_graph(x, each, RoutingPlan.from_levels(levels, 1), *rows)
        assert torch.equal(dynamic_graph(x, each, plan, *rows), wanted)


def test_gradients_are_refused():
    graph, (x, levels, *rows) = graph_of(16), case(5, 16, (6, 6))
    rows[1].requires_grad_()
    plan = RoutingPlan.from_levels(levels, 1)
    with pytest.raises(ValueError, match="gates must not require a gradient"):
        dynamic_graph(x, graph, plan, *rows)
    with torch.no_grad():
        assert dynamic_graph(x, graph, plan, *rows).isfinite().all()


def test_opcheck():
    graph, (x, levels, *rows) = graph_of(16), case(5, 16, (6, 6))
    plan = RoutingPlan.from_levels(levels, 1)
    ends = [end for edge in EDGES for end in edge]
    tensors = list(graph.weights), list(graph.biases), list(graph.direct)
    arguments = (x, plan.levels, plan.order, plan.offsets, *rows, *tensors, STATES, ends)
    torch.library.opcheck(torch.ops.den_kernels.dynamic_graph.default, arguments)
