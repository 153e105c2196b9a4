"""Sub-network of one task as an ordinary network: plain convolutions with only the weights that the task keeps."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.dag.head import make_head
from den.dag.network import DagNetwork
from den.dag.peers import CrossStitchNetwork, PeerNetwork, SeparateNetworks
from den.dag.stages import edge_flops, edge_geometry, edge_width, enlarged, pooled, stage_end_flops
from den.dag.stem import make_stem
from den.nn.blocks.residual import Shortcut
from den.nn.ends import ConvNormReLU
from den.nn.task_batch import find_task


class SubNetwork(nn.Module):
    """Images [B, C_k, H_k, W_k] -> what ``model(images, task)`` gives for them; an ordinary network.

    All tensors are copies, of the channel groups that the task uses.  Edges are named after their states,
    ``edges["0-2"]``; gates are numbers.

    Raises ValueError for a task that is not the model's.
    """

    def __init__(self, model: DagNetwork, task: str | int) -> None:
        super().__init__()
        k, config = find_task(task, model.tasks), model.config
        levels = model.gates.edge_levels[k].tolist()
        self._config = config
        self.task, self.kept = model.tasks[k], model.structure(k)
        self.levels = {f"{i}-{j}": levels[e] for e, (i, j) in enumerate(model.graph.edges) if self.kept.edges[e]}
        self.stem = make_stem(self.task, config)
        self.stem.load_state_dict(model.stems[k].state_dict())
        self.head = make_head(self.task, config)
        self.head.load_state_dict(model.heads[k].state_dict())
        self.edges = nn.ModuleDict()
        for e, (i, j) in enumerate(model.graph.edges):
            if self.kept.edges[e]:
                self.edges[f"{i}-{j}"] = plain_edge(model, e, levels[e])
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
                    y, channels = self.edges[f"{i}-{j}"](states[i]), self._config.stage_channels(stage)
                    if y.shape[1] < channels:  # groups that the task does not use are 0
                        y = F.pad(y, (0, 0, 0, 0, 0, channels - y.shape[1]))
                    v = _plus(v, y, self._gates[e])
            states[j] = cast(Tensor, v)  # of a live state: something is read in or comes along an edge
            if self.kept.read_out[j]:
                outs[stage] = _plus(outs.get(stage), states[j], self._read_out[j])
        out = outs.get(0)
        for name, write in self.read_outs.items():
            out = _plus(out, enlarged(write(outs[int(name)]), x.shape[2:]), 1.0)
        return cast(Tensor, out)

    def trunk_flops(self) -> int:
        """Twice the multiply-adds of the convolutions between stem and head for one image."""
        levels = ((*map(int, name.split("-")), level) for name, level in self.levels.items())
        edges = sum(edge_flops(self._config, i, j, level) for i, j, level in levels)
        ends = [*self.read_ins, *self.read_outs]
        return edges + sum(stage_end_flops(self._config, int(stage)) for stage in ends)

    @property
    def parameters_count(self) -> int:
        """Learned numbers, batch norms, stem and head included."""
        return sum(parameter.numel() for parameter in self.parameters())


class PlainBlock(nn.Module):
    """Residual block of ordinary convolutions, of which only `width` hidden channels are computed.

    x [B, C, H, W] -> shortcut(x) + conv2(relu(bn2(conv1(relu(bn1(x)))))), [B, out, H / stride, W / stride].
    """

    def __init__(self, channels: int, out_channels: int, stride: int, width: int) -> None:
        super().__init__()
        self.shortcut = Shortcut(channels, out_channels, stride, "PlainBlock")
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, out_channels, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))
        return self.shortcut(x) + self.conv2(hidden)


def plain_edge(model: DagNetwork, e: int, level: int) -> nn.Module:
    """Edge e of a network as ordinary modules, with copies of the weights of its first `level` channel groups."""
    config, (i, j) = model.config, model.graph.edges[e]
    inputs, outputs, stride = edge_geometry(config, i, j)
    width = edge_width(config, outputs, level)
    plain: nn.Module
    if config.edge == "residual":
        plain = PlainBlock(inputs, outputs, stride, width)
    else:
        plain = ConvNormReLU(inputs, width, 3, stride, 1)
    stored = model.edges[e].state_dict()
    plain.load_state_dict({name: stored[name][tuple(map(slice, t.shape))] for name, t in plain.state_dict().items()})
    return plain


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
