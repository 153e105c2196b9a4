"""Sub-network of one task as an ordinary network: plain convolutions with only the weights that the task keeps."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from den.dag.head import make_head
from den.dag.network import DagNetwork
from den.dag.peers import CrossStitchNetwork, PeerNetwork, SeparateNetworks
from den.dag.stages import edge_flops, edge_geometry, enlarged, pooled, stage_end_flops
from den.dag.stem import make_stem
from den.nn.conv_norm import ConvNormReLU
from den.nn.tasks import find_task


class SubNetwork(nn.Module):
    """Images [B, C_k, H_k, W_k] -> what ``model(images, task)`` gives for them; an ordinary network.

    All tensors are copies.  Edges are named after their states, ``edges["0-2"]``; gates are numbers.

    Raises ValueError for a task that is not the model's, or edges of which the task uses only some channel groups.
    """

    def __init__(self, model: DagNetwork, task: str | int) -> None:
        super().__init__()
        k, config = find_task(task, model.tasks), model.config
        levels = model.gates.edge_levels[k].tolist()
        if any(0 < level < config.groups for level in levels):
            raise ValueError(f"SubNetwork: edges must be used whole, got levels {levels} of {config.groups} groups")
        self._config = config
        self.task, self.kept = model.tasks[k], model.structure(k)
        self.stem = make_stem(self.task, config)
        self.stem.load_state_dict(model.stems[k].state_dict())
        self.head = make_head(self.task, config)
        self.head.load_state_dict(model.heads[k].state_dict())
        self.edges = nn.ModuleDict()
        for e, (i, j) in enumerate(model.graph.edges):
            if self.kept.edges[e]:
                inputs, outputs, stride = edge_geometry(config, i, j)
                edge = ConvNormReLU(inputs, outputs, 3, stride, 1)
                edge.load_state_dict(model.edges[e].state_dict())
                self.edges[f"{i}-{j}"] = edge
        self._take_stage_ends(model)
        rows = (rows[k].tolist() for rows in model.gates.values(config.gates == "bare"))
        self._read_in, gates, self._read_out = rows
        self._gates = [
            gate / len(model.graph.incoming[j]) for gate, (_, j) in zip(gates, model.graph.edges, strict=True)
        ]
        self.train(model.training).to(model.gates.gamma.device, model.gates.gamma.dtype)

    def _take_stage_ends(self, model: DagNetwork) -> None:
        """Copy the read-in and the read-out of each later stage in which the task keeps one."""
        self.read_ins, self.read_outs = nn.ModuleDict(), nn.ModuleDict()
        config, stage_of = model.config, model.graph.stage_of
        for stage, ends in enumerate(model.stages, 1):
            channels, place = (config.channels, config.stage_channels(stage)), str(stage)
            if any(kept and stage_of[j] == stage for j, kept in enumerate(self.kept.read_in)):
                self.read_ins[place] = ConvNormReLU(*channels, 1, 1, 0)
                self.read_ins[place].load_state_dict(ends.read_in.state_dict())
            if any(kept and stage_of[j] == stage for j, kept in enumerate(self.kept.read_out)):
                self.read_outs[place] = nn.Conv2d(*channels[::-1], 1, bias=False)
                self.read_outs[place].load_state_dict(ends.read_out.state_dict())

    def forward(self, images: Tensor) -> Tensor:  # [B, c, H, W] -> [B, classes]; dense: [B, classes, H, W]
        maps = self.trunk(self.stem(images))
        return self.head(maps if self.task.dense else maps.mean((2, 3)))

    def trunk(self, x: Tensor) -> Tensor:
        """The gated sum of the states that the task keeps: the stem's maps x [B, C, H, W] -> [B, C, H, W]."""
        inputs = {0: x, **{int(s): read(pooled(x, int(s))) for s, read in self.read_ins.items()}}
        states: dict[int, Tensor] = {}
        outs: dict[int, Tensor] = {}
        for j in self.kept.live_states:
            stage = self.kept.graph.stage_of[j]
            v: Tensor | None = inputs[stage] * self._read_in[j] if self.kept.read_in[j] else None
            for e in self.kept.graph.incoming[j]:
                if self.kept.edges[e]:
                    i = self.kept.graph.edges[e][0]
                    v = _plus(v, self.edges[f"{i}-{j}"](states[i]), self._gates[e])
            states[j] = cast(Tensor, v)  # of a live state: something is read in or comes along an edge
            if self.kept.read_out[j]:
                outs[stage] = _plus(outs.get(stage), states[j], self._read_out[j])
        out = outs.get(0)
        for name, write in self.read_outs.items():
            out = _plus(out, enlarged(write(outs[int(name)]), x.shape[2:]), 1.0)
        return cast(Tensor, out)

    def trunk_flops(self) -> int:
        """Twice the multiply-adds of the convolutions between stem and head for one image."""
        edges = sum(edge_flops(self._config, *map(int, name.split("-"))) for name in self.edges)
        ends = [*self.read_ins, *self.read_outs]
        return edges + sum(stage_end_flops(self._config, int(stage)) for stage in ends)

    @property
    def parameters_count(self) -> int:
        """Learned numbers, batch norms, stem and head included."""
        return sum(parameter.numel() for parameter in self.parameters())


def alone(model: DagNetwork | PeerNetwork, task: str | int) -> SubNetwork:
    """The network of one task, in evaluation mode.

    Raises ValueError for a task that is not the model's, and for a cross-stitch network, whose tasks need all columns.
    """
    if isinstance(model, CrossStitchNetwork):
        raise ValueError("SubNetwork: model must have a network for each task, got a cross-stitch network")
    if isinstance(model, SeparateNetworks):
        return SubNetwork(model.networks[find_task(task, model.tasks)], 0).eval()
    return SubNetwork(cast(DagNetwork, model), task).eval()


def _plus(total: Tensor | None, y: Tensor, gate: float) -> Tensor:  # [B, C, H, W]
    """total + gate * y, in place for inference; total None: gate * y."""
    if total is None:
        return y * gate
    return torch.add(total, y, alpha=gate) if torch.is_grad_enabled() else total.add_(y, alpha=gate)
