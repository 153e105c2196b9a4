"""A directed acyclic graph of convolutions at inference, each instance with the edges that it keeps, in one call.

    v_j = read_in[b, j] x + sum over the edges (i, j) that instance b keeps of gates[b, e] relu(conv(v_i, w_e) + bias_e)
    out = sum over j of read_out[b, j] v_j

An instance keeps an edge where its level is 1 in the edge's block of a `RoutingPlan`, which has a block for each edge.

On a CPU with AVX-512 or AVX2, in float32, one C++ call runs the whole graph (csrc/direct_graph.h): a thread takes an
instance from the first state to the last, so that its states stay in the core's cache; nothing is gathered, scattered
or allocated on the way.  States of large maps go through the cache in bands of rows.  Elsewhere on a CPU, and for fewer
large maps than threads, each edge runs over the rows of its instances, gathered for it.

On a GPU an edge is one launch of the Triton convolution, which multiplies by the gate and adds to the state itself, and
leaves instances alone that do not keep the edge; one launch before reads all states in, one behind reads them out.  The
host waits for nothing.  Where Triton does not run, whole batches go through PyTorch's operations.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _triton
from .eager import call_op, in_range, not_scriptable, refuse_symbols, refuse_training, runs_eagerly
from .graph_weights import GraphWeights
from .plan import RoutingPlan
from .rows import gather_rows, read_route, scatter_rows_

_OP = "dynamic_graph"
_NAME = "den_kernels::dynamic_graph"


def dynamic_graph_reference(
    x: Tensor,  # [B, C, H, W]
    graph: GraphWeights,
    levels: Tensor,  # integer [B, E]
    read_in: Tensor,  # [B, N]
    gates: Tensor,  # [B, E]
    read_out: Tensor,  # [B, N]
) -> Tensor:  # [B, C, H, W]
    """The definition of `dynamic_graph`, as plain loops over instances, states and edges."""
    outs = []
    for b in range(len(x)):
        states: list[Tensor] = []
        for j in range(graph.states):
            v = read_in[b, j] * x[b]
            for e, (i, head) in enumerate(graph.edges):
                if head == j and levels[b, e] > 0:
                    y = F.conv2d(states[i][None], graph.weights[e], graph.biases[e], padding=_padding(graph))
                    v = v + gates[b, e] * y[0].relu()
            states.append(v)
        outs.append(sum((read_out[b, j] * v for j, v in enumerate(states)), torch.zeros_like(x[b])))
    return torch.stack(outs) if outs else torch.zeros_like(x)


@not_scriptable
def dynamic_graph(
    x: Tensor,  # [B, C, H, W]
    graph: GraphWeights,
    plan: RoutingPlan,  # a block of one group for each edge
    read_in: Tensor,  # [B, N]
    gates: Tensor,  # [B, E]
    read_out: Tensor,  # [B, N]
) -> Tensor:  # [B, C, H, W], channels-last
    """The gated sum of the graph's states for each instance: see the module.  No gradients; all tensors of one dtype.

    Equivalent to ``dynamic_graph_reference(x, graph, plan.levels, read_in, gates, read_out)``.  An edge costs nothing
    for an instance that does not keep it.

    Raises ValueError for shapes, dtypes or devices that do not fit each other and where a gradient is required,
    RuntimeError inside torch.func.
    """
    eager = runs_eagerly(x, read_in, gates, read_out)
    if not eager:
        refuse_symbols(_OP, x)
    _check(x, graph, plan, read_in, gates, read_out)
    if eager:
        return in_range(_NAME, _run, x, graph, plan, read_in, gates, read_out)
    refuse_training(_OP, x=x, read_in=read_in, gates=gates, read_out=read_out)
    ends = [end for edge in graph.edges for end in edge]
    tensors = list(graph.weights), list(graph.biases), list(graph.direct)
    return call_op(
        _op, x, plan.levels, plan.order, plan.offsets, read_in, gates, read_out, *tensors, graph.states, ends
    )


def _run(
    x: Tensor,  # [B, C, H, W]
    graph: GraphWeights,
    plan: RoutingPlan,
    read_in: Tensor,  # [B, N]
    gates: Tensor,  # [B, E]
    read_out: Tensor,  # [B, N]
) -> Tensor:  # [B, C, H, W] channels-last
    x = x.contiguous(memory_format=torch.channels_last)
    if not x.is_cpu:
        if _triton.takes(x):
            from ._triton.graph import run_graph

            return run_graph(x, graph.edges, graph.weights, graph.biases, plan, read_in, gates, read_out)
        return run_masked(x, graph, plan, read_in, gates, read_out)
    if not graph.runs_whole(x):
        return _run_edges(x, graph, plan, read_in, gates, read_out)
    out = torch.empty_like(x)
    graph.handle(x, out, plan.levels.t().contiguous(), read_in.contiguous(), gates.contiguous(), read_out.contiguous())
    return out


@torch.library.custom_op(_NAME, mutates_args=())
def _op(
    x: Tensor,  # [B, C, H, W]
    levels: Tensor,  # int32 [B, E]
    order: Tensor,  # int32 [E, B]
    offsets: Tensor,  # int32 [E, 3]
    read_in: Tensor,  # [B, N]
    gates: Tensor,  # [B, E]
    read_out: Tensor,  # [B, N]
    weights: list[Tensor],  # [C, C, R, S] of each edge
    biases: list[Tensor],  # [C] of each edge
    direct: list[Tensor],  # the packed weights, or []
    states: int,  # N
    ends: list[int],  # [2 E]: i, j of each edge
) -> Tensor:  # [B, C, H, W] channels-last
    graph = graph_of(weights, biases, direct, states, ends)
    return _run(x, graph, RoutingPlan(levels, order, offsets, 1), read_in, gates, read_out)


def graph_of(
    weights: list[Tensor], biases: list[Tensor], direct: list[Tensor], states: int, ends: list[int]
) -> GraphWeights:
    """The graph that these operands of the op stand for: weights [C, C, R, S] and biases [C] of each edge."""
    edges = tuple(zip(ends[::2], ends[1::2], strict=True))
    return GraphWeights(states, edges, tuple(weights), tuple(biases), tuple(direct))


@_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:  # [B, C, H, W] channels-last
    return torch.empty_like(x, memory_format=torch.channels_last)


def _run_states(
    x: Tensor,  # [B, C, H, W] channels-last
    graph: GraphWeights,
    read_in: Tensor,  # [B, N]
    read_out: Tensor,  # [B, N]
    add: Callable[[Tensor, Tensor, int], Tensor],
) -> Tensor:  # [B, C, H, W] channels-last
    """The graph state by state; add(v, state, e): v [B, C, H, W] and what edge e makes of the state that it leaves."""
    states: list[Tensor] = []
    out = torch.zeros_like(x)
    for j in range(graph.states):
        v = x * _column(read_in, j)
        for e, (i, head) in enumerate(graph.edges):
            if head == j:
                v = add(v, states[i], e)
        states.append(v)
        out = torch.addcmul(out, v, _column(read_out, j))
    return out


def _convolved(graph: GraphWeights, e: int, rows: Tensor) -> Tensor:  # [n, C, H, W]
    """relu(conv(rows) + bias) of edge e."""
    return F.conv2d(rows, graph.weights[e], graph.biases[e], padding=_padding(graph)).relu_()


def _run_edges(
    x: Tensor,  # [B, C, H, W] channels-last
    graph: GraphWeights,
    plan: RoutingPlan,
    read_in: Tensor,  # [B, N]
    gates: Tensor,  # [B, E]
    read_out: Tensor,  # [B, N]
) -> Tensor:  # [B, C, H, W] channels-last
    """The graph edge by edge, each over the rows of the instances that keep it."""
    for route in plan:
        read_route(route)
    counts = plan.levels.sum(0).tolist()

    def add(v: Tensor, state: Tensor, e: int) -> Tensor:  # written over v
        if counts[e] == len(x):
            v += _convolved(graph, e, state) * _column(gates, e)
        elif counts[e]:
            order = plan.order[e, : counts[e]]
            y = _convolved(graph, e, gather_rows(state, order, x.shape[1])) * _column(gates[order.long()], e)
            scatter_rows_(v, y.contiguous(memory_format=torch.channels_last), order, accumulate=True)
        return v

    return _run_states(x, graph, read_in, read_out, add)


def run_masked(
    x: Tensor,  # [B, C, H, W] channels-last
    graph: GraphWeights,
    plan: RoutingPlan,
    read_in: Tensor,  # [B, N]
    gates: Tensor,  # [B, E]
    read_out: Tensor,  # [B, N]
) -> Tensor:  # [B, C, H, W] channels-last
    """The graph on any device, without waiting for it: each edge over all instances. Nothing is written over."""

    def add(v: Tensor, state: Tensor, e: int) -> Tensor:
        made = F.conv2d(state, graph.weights[e], graph.biases[e], padding=_padding(graph)).relu()
        return v + torch.where(_column(plan.levels, e) > 0, made * _column(gates, e), 0)

    return _run_states(x, graph, read_in, read_out, add)


def _padding(graph: GraphWeights) -> tuple[int, int]:
    R, S = graph.weights[0].shape[2:]
    return R // 2, S // 2


def _column(rows: Tensor, index: int) -> Tensor:  # [B, n] -> [B, 1, 1, 1]
    return rows[:, index, None, None, None]


def _check(x: Tensor, graph: GraphWeights, plan: RoutingPlan, read_in: Tensor, gates: Tensor, read_out: Tensor) -> None:
    """Raise ValueError unless x is [B, C, H, W], read_in and read_out [B, N], gates [B, E], all as the graph is."""
    C, E = graph.weights[0].shape[0], len(graph.edges)
    if x.ndim != 4 or x.shape[1] != C or 0 in x.shape[2:]:
        raise ValueError(f"{_OP}: x must be [B, {C}, H, W] with H and W of at least 1, got {list(x.shape)}")
    B = x.shape[0]
    if plan.levels.device != x.device or plan.levels.dtype != torch.int32:
        got = f"{plan.levels.dtype} on {plan.levels.device}"
        raise ValueError(f"{_OP}: plan must be of int32 levels on {x.device}, as x is, got {got}")
    if tuple(plan.levels.shape) != (B, E) or plan.groups != 1:
        raise ValueError(
            f"{_OP}: plan must hold {E} blocks of one group for {B} instances,"
            f" got {len(plan)} of {plan.groups} for {plan.batch_size}"
        )
    for name, rows, width in (("read_in", read_in, graph.states), ("gates", gates, E),
                              ("read_out", read_out, graph.states)):  # fmt: skip
        if tuple(rows.shape) != (B, width):
            raise ValueError(f"{_OP}: {name} must be [{B}, {width}], got {list(rows.shape)}")
    for name, tensor in (("x", x), ("read_in", read_in), ("gates", gates), ("read_out", read_out),
                         ("weights", graph.weights[0]), ("biases", graph.biases[0])):  # fmt: skip
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(f"{_OP}: {name} must be {x.dtype} on {x.device}, got {tensor.dtype} on {tensor.device}")
