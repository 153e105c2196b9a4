"""The central network: states in a restricted DAG, edges that all tasks share, and for each task its gates over them.

    v_j = a_j x + (1 / In_j) sum over edges (i, j) of g_ij e_ij(v_i)
    logits = head(mean over the map of sum_j b_j v_j)

x is the task's stem, a, g, b are its gates, In_j is the in-degree of state j in the restricted graph, whatever was
removed from it.  A dense task's head reads the map itself.  States of a later stage, where there are stages, are read
in and out through 1x1 convolutions (`den.dag.stages`).

After W. Choi and S. Im, Dynamic neural network for multi-task learning searching across diverse network topologies,
CVPR 2023; of its details only the abstract was at hand, the formulas above are this library's.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from den.dag.edge import Edge
from den.dag.ends import MixedEnds
from den.dag.gates import Gates
from den.dag.graph import SubGraph
from den.dag.head import ClassHead, make_head
from den.dag.model_config import DagConfig
from den.dag.stages import StageEnds, make_edge
from den.dag.stem import DagStem, Stem, make_stem
from den.nn.blocks import ElasticBlock
from den.nn.folding import folded_weight
from den.nn.modules import Modules
from den.nn.task_batch import Images, TaskBatch, Tasks, task_batch
from den_kernels import GraphWeights, Route, RoutingPlan, dynamic_graph
from den_kernels.building import FoldCache, may_fold


@dataclass(frozen=True, eq=False)
class BatchGates:
    """The gates of every instance of a batch, and which edges it runs."""

    read_in: Tensor  # [B, N]
    edges: Tensor  # [B, E], divided by the in-degree of the state that the edge leads to
    read_out: Tensor  # [B, N]
    plan: RoutingPlan | None  # blocks: see `Gates.block_levels`; None: every instance runs every one whole
    runs: tuple[tuple[tuple[int, int], ...], ...]  # of each block: the instances that run it, as [start, stop) ranges
    ends: tuple[tuple[tuple[int, int], ...], ...]  # of each state: the instances that read it out, in the same way


class DagNetwork(nn.Module):
    """One network, one topology per task: see the module.  ``images`` and ``task`` are those of `DeepElasticNetwork`.

    A batch of several tasks runs every edge once, over the instances whose task keeps it.  Several tasks of the same
    images are a list that holds the same tensor for each: ``model([x, x, x], ["segmentation", "depth", "normals"])``.
    After the stems an instance is then an image and a task, and one plan routes all of them.

    On a GPU a call waits for nothing, but once after every change of what the tasks keep.  A CUDA graph may be captured
    when a batch of as many images of the same tasks has run before, and then serves other images.
    """

    in_degrees: Tensor  # float32 [E], edges that end where an edge does

    def __init__(self, config: DagConfig) -> None:
        super().__init__()
        self.config, self.tasks, self.graph = config, config.tasks, config.graph
        self.stems: Modules[Stem] = Modules(make_stem(task, config) for task in config.tasks)
        self.edges: Modules[Edge | ElasticBlock] = Modules(make_edge(config, i, j) for i, j in self.graph.edges)
        self.heads: Modules[nn.Module] = Modules(make_head(task, config) for task in config.tasks)
        later = range(1, len(self.graph.stages))
        self.stages: Modules[StageEnds] = Modules(StageEnds(config, stage) for stage in later)
        self.gates = Gates(self.graph, len(config.tasks), config.groups)
        degrees = [len(self.graph.incoming[j]) for _, j in self.graph.edges]
        self.register_buffer("in_degrees", torch.tensor(degrees, dtype=torch.float32), persistent=False)
        self._host: FoldCache[tuple[list[list[int]], list[list[bool]]]] = FoldCache()
        self._routed: FoldCache[BatchGates] = FoldCache()
        self._packed: FoldCache[GraphWeights] = FoldCache()
        self._ends: FoldCache[MixedEnds] = FoldCache()

    def forward(self, images: Images, task: Tasks) -> Tensor | list[Tensor]:
        """Logits: [B, classes] of one task, [B, classes, H, W] of a dense one; a list of them for a list of images; for
        tasks per instance [B, most classes], -inf in the classes that an instance's task does not have.

        Raises ValueError for images or task that do not fit.
        """
        batch = task_batch(images, task, self.tasks, like=self.gates.gamma)
        most = max(known.classes for known in self.tasks)
        if ends := self._mixed_ends(batch):
            maps = self.trunk(ends.stem(batch.images), self.route(batch))
            return batch.restore_logits(ends.head(maps.mean((2, 3))), most)
        parts = [self.stems[k](part) for k, part in zip(batch.tasks, batch.images, strict=True)]
        x = torch.cat(parts) if len(parts) > 1 else parts[0]
        maps = self.trunk(x.contiguous(memory_format=torch.channels_last), self.route(batch))
        pooled = maps if all(self.tasks[k].dense for k in batch.tasks) else maps.mean((2, 3))
        logits = [
            self.heads[k](part if self.tasks[k].dense else means)
            for k, part, means in zip(batch.tasks, maps.split(batch.sizes), pooled.split(batch.sizes), strict=True)
        ]
        return batch.restore_logits(logits, most)

    def _mixed_ends(self, batch: TaskBatch) -> MixedEnds | None:
        """The stems and heads of the batch's tasks, folded for one pass and cached; None where they do not fit."""
        stems, heads = [self.stems[k] for k in batch.tasks], [self.heads[k] for k in batch.tasks]
        casts = torch.is_autocast_enabled(batch.images[0].device.type)
        if casts or not may_fold(self) or not MixedEnds.fit(stems, heads, batch.images):
            return None
        alike = cast(list[DagStem], stems), cast(list[ClassHead], heads)
        return self._ends.of(MixedEnds.modules(*alike), lambda: MixedEnds.fold(*alike))

    def trunk(self, x: Tensor, gates: BatchGates) -> Tensor:
        """The gated sum of all states, [B, C, H, W], of the stems' maps x."""
        if may_fold(self) and not self.stages:
            return self._infer(x, gates)
        inputs = [x, *(ends.read(x, self._block(gates, 2 * s)) for s, ends in enumerate(self.stages))]
        outs: list[Tensor] = [torch.zeros_like(each) for each in inputs]
        states: list[Tensor] = []
        for j, stage in enumerate(self.graph.stage_of):
            v = inputs[stage] * _column(gates.read_in, j)
            for e in self.graph.incoming[j]:
                if gates.runs[e]:
                    v = torch.addcmul(v, self._edge(e, states, gates), _column(gates.edges, e))
            states.append(v)
            outs[stage] = torch.addcmul(outs[stage], v, _column(gates.read_out, j))
        out = outs[0]
        for s, ends in enumerate(self.stages):
            out = out + ends.write(outs[s + 1], self._block(gates, 2 * s + 1))
        return out

    def _block(self, gates: BatchGates, index: int) -> Route | None:
        """The route of block `index` after the edges, a stage's read-in or read-out; None: all instances."""
        return None if gates.plan is None else gates.plan[len(self.edges) + index]

    def _infer(self, x: Tensor, gates: BatchGates) -> Tensor:
        """`trunk` on folded weights, x [B, C, H, W]: plain convolutions of one channel group in one call."""
        plain = self.config.groups == 1 and self.config.edge == "conv"
        if plain and x.dtype == gates.edges.dtype and gates.plan is not None:
            return dynamic_graph(x, self._weights(), gates.plan, gates.read_in, gates.edges, gates.read_out)
        return self.run_edges(x, gates)

    def run_edges(self, x: Tensor, gates: BatchGates) -> Tensor:
        """`trunk` for inference, x [B, C, H, W]: one edge after the other, each added to the instances that use it."""
        states: list[Tensor] = []
        out = torch.zeros_like(x)
        for j in range(self.graph.states):
            v = x * _column(gates.read_in, j)
            for e in self.graph.incoming[j]:
                if gates.runs[e]:
                    y, gate = self._edge(e, states, gates), _column(gates.edges, e)
                    for start, stop in gates.runs[e]:
                        v[start:stop].addcmul_(y[start:stop], gate[start:stop])
            states.append(v)
            for start, stop in gates.ends[j]:
                out[start:stop].addcmul_(v[start:stop], _column(gates.read_out, j)[start:stop])
        return out

    def _weights(self) -> GraphWeights:
        """The edges' convolutions with their batch norms folded in; of a network without residual blocks."""
        edges = [cast(Edge, edge) for edge in self.edges]

        def pack() -> GraphWeights:
            pairs = [folded_weight(edge.conv, edge.norm) for edge in edges]
            return GraphWeights.pack(self.graph.states, self.graph.edges, *zip(*pairs, strict=True))

        return self._packed.of(tuple(module for edge in edges for module in (edge.conv, edge.norm)), pack)

    def _edge(self, e: int, states: list[Tensor], gates: BatchGates) -> Tensor:  # [B, C, H, W] each
        """The output of edge e, computed from the state that it leaves."""
        return self.edges[e](states[self.graph.edges[e][0]], None if gates.plan is None else gates.plan[e])

    def route(self, batch: TaskBatch) -> BatchGates:
        """Gates and plan of a batch.  For inference they are kept for the next batch of the same make-up."""
        if not may_fold(self):
            return self._route(batch)
        gates = self.gates
        sources = gates.alpha, gates.beta, gates.gamma, gates.edge_levels, gates.kept_in, gates.kept_out
        return self._routed.get(sources, lambda: self._route(batch), batch.tasks, *batch.sizes)

    def _route(self, batch: TaskBatch) -> BatchGates:
        device, parts = self.in_degrees.device, zip(batch.tasks, batch.sizes, strict=True)
        tasks = torch.cat([torch.full((n,), k, device=device) for k, n in parts])  # sending it there would wait
        a, g, b = (rows.index_select(0, tasks) for rows in self.gates.values(self.config.gates == "bare"))
        sources = self.gates.edge_levels, self.gates.kept_in, self.gates.kept_out
        levels, read_out = self._host.get(sources, self._read_kept)
        used, ends = [levels[k] for k in batch.tasks], [read_out[k] for k in batch.tasks]
        plan, groups = None, self.config.groups
        if may_fold(self) or any(level < groups for row in used for level in row):
            plan = RoutingPlan.from_levels(self.gates.block_levels().index_select(0, tasks), groups)
        runs = tuple(_runs([row[e] > 0 for row in used], batch.sizes) for e in range(len(used[0])))
        out_runs = tuple(_runs([row[j] for row in ends], batch.sizes) for j in range(self.graph.states))
        return BatchGates(a, g / self.in_degrees, b, plan, runs, out_runs)

    def _read_kept(self) -> tuple[list[list[int]], list[list[bool]]]:
        """Levels of all blocks, and which states are read out, by task; the one thing that waits for a GPU."""
        return self.gates.block_levels().tolist(), self.gates.kept_out.tolist()

    def keep(self, task: int, kept: SubGraph) -> None:
        """Let a task keep only `kept` of the graph."""
        self.gates.keep(task, kept)

    def structure(self, task: int) -> SubGraph:
        """The sub-graph that a task keeps, less the items that lie on no path of it."""
        return self.gates.structure(task).clean()

    def used_edges(self) -> tuple[int, ...]:
        """The edges that at least one task keeps; the weights of the others can go."""
        kept = [self.structure(k).edges for k in range(len(self.tasks))]
        return tuple(e for e in range(len(self.edges)) if any(edges[e] for edges in kept))

    def train(self, mode: bool = True) -> DagNetwork:
        for cache in (self._routed, self._packed, self._ends):
            cache.clear()
        return super().train(mode)


def _column(rows: Tensor, index: int) -> Tensor:  # [B, n] -> [B, 1, 1, 1]
    return rows[:, index, None, None, None]


def _runs(used: list[bool], sizes: list[int]) -> tuple[tuple[int, int], ...]:
    """Neighbouring parts in use, as ranges of instances.

    >>> _runs([True, True, False, True], [2, 3, 4, 5])
    ((0, 5), (9, 14))
    """
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    found: list[tuple[int, int]] = []
    for flag, (start, stop) in zip(used, pairwise(bounds), strict=True):
        if flag:  # an empty part too: other processes may have images of its task
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], stop)
            else:
                found.append((start, stop))
    return tuple(found)
