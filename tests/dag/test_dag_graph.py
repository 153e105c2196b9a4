"""Graph, sub-graphs and the flow-based reduction: properties on random graphs and gates."""

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from den.dag.graph import KINDS, Graph, SubGraph
from den.dag.reduction import TaskGates, flow, ranked, reduce, targets

RANKINGS = ["flow", "gates", "random"]


@st.composite
def graphs(draw):
    states = draw(st.integers(2, 12))
    return Graph(states, draw(st.integers(1, states - 1)))


@st.composite
def gated_graphs(draw):
    graph = draw(graphs())
    gate = st.floats(0.001, 0.999)
    lists = [st.lists(gate, min_size=n, max_size=n) for n in (graph.states, graph.states, len(graph.edges))]
    return graph, TaskGates(*(draw(each) for each in lists))


@st.composite
def sub_graphs(draw):
    graph = draw(graphs())
    flags = [st.lists(st.booleans(), min_size=n, max_size=n) for n in (len(graph.edges), graph.states, graph.states)]
    return SubGraph(graph, *(tuple(draw(each)) for each in flags))


def random_gates(graph, generator, spread=1.5):
    def draw(n):
        return [1 / (1 + math.exp(-generator.gauss(0, spread))) for _ in range(n)]

    return TaskGates(draw(graph.states), draw(graph.states), draw(len(graph.edges)))


def halves(graph):
    return TaskGates([0.5] * graph.states, [0.5] * graph.states, [0.5] * len(graph.edges))


@given(graphs())
def test_edges_are_as_many_as_the_formula_says_and_reach_no_further_than_the_flow(graph):
    N, M = graph.states, graph.flow
    assert len(graph.edges) == M * N - M * (M + 1) // 2
    assert set(graph.edges) == {(i, j) for i in range(N) for j in range(N) if 1 <= j - i <= M}


@pytest.mark.parametrize(
    ("states", "flow_", "edges"), [(12, 3, 30), (12, 5, 45), (12, 7, 56), (12, 9, 63), (8, 3, 18), (8, 5, 25)]
)
def test_edges_of_named_sizes(states, flow_, edges):
    assert len(Graph(states, flow_).edges) == edges


@given(graphs())
def test_every_edge_goes_into_its_head_and_out_of_its_tail(graph):
    assert [len(edges) for edges in graph.incoming] == [min(j, graph.flow) for j in range(graph.states)]
    for e, (i, j) in enumerate(graph.edges):
        assert e in graph.outgoing[i]
        assert e in graph.incoming[j]


@pytest.mark.parametrize(("states", "flow_"), [(8, 0), (8, 8), (8, 9), (1, 1), (8, -1)])
def test_flow_outside_its_range_is_refused(states, flow_):
    with pytest.raises(ValueError, match=r"Graph: flow must be in 1\.\."):
        Graph(states, flow_)


@given(sub_graphs())
def test_clean_is_idempotent_and_only_removes(sub):
    clean = sub.clean()
    assert clean.clean() == clean
    assert all(sub.keeps(item) for item in clean.items())
    assert clean.has_path() == sub.has_path() == bool(clean.items())


@given(sub_graphs())
def test_clean_keeps_exactly_the_items_on_a_path(sub):
    nodes = {-1: {j for j, kept in enumerate(sub.read_in) if kept}, sub.graph.states: set()}
    for j in range(sub.graph.states):
        nodes[j] = {sub.graph.edges[e][1] for e in sub.graph.outgoing[j] if sub.edges[e]}
        nodes[j] |= {sub.graph.states} if sub.read_out[j] else set()

    def paths(node):
        return [[node]] if node == sub.graph.states else [[node, *p] for n in nodes[node] for p in paths(n)]

    if sum(map(len, nodes.values())) > 24:
        return
    steps = {(a, b) for path in paths(-1) for a, b in pairwise(path)}
    assert {(item.tail, item.head) for item in sub.clean().items()} == steps


@given(gated_graphs())
def test_flow_is_one_unit_that_no_state_makes_or_loses(case):
    graph, gates = case
    found = flow(graph, gates)
    assert sum(found.read_in) == pytest.approx(1)
    assert sum(found.read_out) == pytest.approx(1)
    for j in range(graph.states):
        arriving = found.read_in[j] + sum(found.edges[e] for e in graph.incoming[j])
        leaving = found.read_out[j] + sum(found.edges[e] for e in graph.outgoing[j])
        assert arriving == pytest.approx(leaving)


def test_flow_of_a_graph_small_enough_to_do_by_hand():
    found = flow(Graph(2, 1), TaskGates(read_in=[0.75, 0.25], read_out=[0.2, 0.5], edges=[0.6]))
    assert found.read_in == pytest.approx((0.75, 0.25))
    assert found.edges == pytest.approx((0.75 * 0.6 / 0.8,))
    assert found.read_out == pytest.approx((0.75 * 0.2 / 0.8, 0.25 + 0.75 * 0.6 / 0.8))


@settings(deadline=None)
@given(gated_graphs(), st.floats(0, 1), st.sampled_from(RANKINGS), st.booleans())
def test_a_path_survives_every_ratio_and_no_target_is_undercut(case, ratio, ranking, rerank):
    graph, gates = case
    for ends in (None, ratio):
        found = reduce(graph, gates, ratio, ends=ends, ranking=ranking, rerank=rerank and ranking == "flow")
        assert found.kept.has_path()
        assert found.kept.clean() == found.kept
        assert all(excess > 0 for excess in found.missed.values())
        assert bool(found.explain()) == bool(found.missed)
        assert set(found.targets) == ({"edge"} if ends is None else set(KINDS))


@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.5])
@pytest.mark.parametrize(("states", "flow_"), [(8, 3), (8, 5), (8, 7), (12, 3), (12, 5), (12, 9)])
def test_targets_are_met_exactly(states, flow_, ratio):
    graph, generator = Graph(states, flow_), random.Random(states + flow_)
    for _ in range(40):
        found = reduce(graph, random_gates(graph, generator), ratio, ends=ratio)
        assert found.missed == {}
        assert {kind: found.kept.count(kind) for kind in KINDS} == targets(graph.whole(), ratio, ratio)


def test_without_a_share_of_the_ends_only_those_of_dead_states_go():
    graph, generator = Graph(6, 2), random.Random(2)
    for _ in range(20):
        found = reduce(graph, random_gates(graph, generator), 0.7)
        assert found.missed == {}
        assert all(found.kept.read_in) and all(found.kept.read_out)  # noqa: PT018  a state with both is never dead
    chain = SubGraph(graph, graph.whole().edges, (True, *[False] * 5), (True,) * 6)
    found = reduce(chain, random_gates(graph, generator), 0.9, guard=True)
    assert found.missed == {}
    assert 1 <= found.kept.count("read-out") <= 2  # of the states that the one edge left reaches
    assert found.kept.count("edge") == 1


def test_reranked_reduction_removes_what_carries_least_of_what_is_left():
    """Against a search written anew: at every step the flow of the remaining graph is computed by adding up all
    paths."""

    def carried(sub, gates):
        flows = dict.fromkeys(range(len(sub.graph.edges)), 0.0)
        total = sum(gates.read_in)

        def walk(state, mass):
            leaving = {e: gates.edges[e] for e in sub.graph.outgoing[state] if sub.edges[e]}
            out = sum(leaving.values()) + gates.read_out[state]
            for e, gate in leaving.items():
                flows[e] += mass * gate / out
                walk(sub.graph.edges[e][1], mass * gate / out)

        for j in range(sub.graph.states):
            walk(j, gates.read_in[j] / total)
        return flows

    graph, generator = Graph(6, 3), random.Random(4)
    differs = 0
    for _ in range(20):
        gates, kept = random_gates(graph, generator), graph.whole()
        while kept.count("edge") > 6:
            flows = carried(kept, gates)
            least = min((e for e in flows if kept.edges[e]), key=flows.get)
            kept = SubGraph(graph, tuple(flag and e != least for e, flag in enumerate(kept.edges)), kept.read_in,
                            kept.read_out)  # fmt: skip
        assert reduce(graph, gates, 0.5, rerank=True).kept == kept
        differs += reduce(graph, gates, 0.5).kept != kept
    assert differs > 0


def test_only_the_flow_is_ranked_again():
    with pytest.raises(ValueError, match="ranking must be flow to rerank, got 'random'"):
        reduce(Graph(3, 2), halves(Graph(3, 2)), 0.5, ranking="random", rerank=True)


def test_the_edge_target_is_met_exactly_up_to_eight_tenths():
    generator = random.Random(0)
    for graph in (Graph(8, 3), Graph(8, 5), Graph(8, 7)):
        for ratio in (0.6, 0.7, 0.8):
            found = [reduce(graph, random_gates(graph, generator), ratio, ends=ratio) for _ in range(30)]
            assert not any("edge" in each.missed for each in found)


def test_without_the_guard_the_target_is_overshot():
    graph, generator = Graph(8, 3), random.Random(1)
    kept = [
        reduce(graph, random_gates(graph, generator), 0.5, ends=0.5, guard=False).kept.count("edge") for _ in range(100)
    ]
    assert sum(kept) / 100 < 8.5
    assert max(kept) <= 9


def test_ties_go_by_span_then_by_head():
    graph = Graph(3, 2)
    order = [item for item in ranked(graph, halves(graph), "gates") if item.kind == "edge"]
    assert [(item.tail, item.head) for item in order] == [(0, 2), (1, 2), (0, 1)]


def test_by_gates_items_go_in_the_order_of_their_own_gates():
    graph = Graph(5, 2)
    gates = random_gates(graph, random.Random(3))
    own = {"edge": gates.edges, "read-in": gates.read_in, "read-out": gates.read_out}
    order = ranked(graph, gates, "gates")
    values = [own[item.kind][item.index] for item in order]
    assert len(set(values)) == len(graph.edges) + 2 * graph.states
    assert values == sorted(values)


def test_random_reduction_is_its_seeds():
    graph = Graph(8, 3)
    once, again, other = (reduce(graph, halves(graph), 0.5, ranking="random", seed=seed).kept for seed in (3, 3, 4))
    assert once == again != other


def test_flow_ranks_an_edge_by_what_comes_through_it_not_by_its_gate():
    graph = Graph(3, 1)
    gates = TaskGates([0.02, 0.98, 0.02], [0.9, 0.1, 0.9], [0.9, 0.5])  # edge 0-1 has the larger gate, but no inflow
    first = {ranking: next(item for item in ranked(graph, gates, ranking) if item.kind == "edge")
             for ranking in ("flow", "gates")}  # fmt: skip
    assert (first["flow"].index, first["gates"].index) == (0, 1)


def test_a_ratio_that_leaves_nothing_keeps_a_path_and_says_so():
    graph = Graph(5, 2)
    found = reduce(graph, halves(graph), 1.0, ends=1.0)
    assert found.kept.has_path()
    assert "where 0 were wanted" in found.explain()


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (TaskGates([0.5] * 3, [0.5] * 3, [0.5] * 2), "edges must be 3 gates"),
        (TaskGates([0.5] * 3, [0.5] * 3, [0.5, 1.5, 0.5]), "edges must be 3 gates"),
        (TaskGates([0.0] * 3, [0.5] * 3, [0.5] * 3), "read_in must hold a gate above 0"),
        (TaskGates([0.5] * 3, [0.5, 0.5, 0.0], [0.5] * 3), "gate above 0 to leave by, got none for state 2"),
    ],
)
def test_gates_that_do_not_fit_are_refused(gates, message):
    with pytest.raises(ValueError, match=message):
        reduce(Graph(3, 2), gates, 0.5)


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ValueError, match=r"ratio must be in 0\.\.1"):
        reduce(Graph(3, 2), halves(Graph(3, 2)), ratio)
    with pytest.raises(ValueError, match=r"ends must be in 0\.\.1"):
        reduce(Graph(3, 2), halves(Graph(3, 2)), 0.5, ends=ratio)


def test_depth_width_and_sparsity_of_a_sub_graph():
    graph = Graph(4, 2)  # edges 0-1, 0-2, 1-2, 1-3, 2-3
    sub = SubGraph(graph, (True, True, True, False, True), (True, False, False, False), (False, False, True, True))
    assert (sub.depth, sub.width, sub.sparsity) == (3, 2, 0.8)
    assert sub.live_states == (0, 1, 2, 3)
