"""One task's sub-network, alone: ordinary convolutions, with the weights that the task keeps and no others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from den.conv_norm import ConvNormReLU
from den.dag.head import ClassHead
from den.dag.network import DagNetwork
from den.dag.stem import DagStem
from den.tasks import find_task


class SubNetwork(nn.Module):
    """Images [B, C_k, S_k, S_k] -> logits [B, classes], as ``model(images, task)`` gives them; an ordinary network.

    All tensors are copies.  Edges are named after their states, ``edges["0-2"]``; gates are numbers.

    Raises ValueError for a task that is not the model's, or edges of which the task uses only some channel groups.
    """

    def __init__(self, model: DagNetwork, task: str | int) -> None:
        super().__init__()
        k, config = find_task(task, model.tasks), model.config
        levels = model.gates.edge_levels[k].tolist()
        if any(0 < level < config.groups for level in levels):
            raise ValueError(f"SubNetwork: edges must be used whole, got levels {levels} of {config.groups} groups")
        self.task, self.kept = model.tasks[k], model.structure(k)
        self.stem = DagStem(self.task, config.channels, config.trunk_size)
        self.stem.load_state_dict(model.stems[k].state_dict())
        self.head = ClassHead(config.channels, self.task.classes)
        self.head.load_state_dict(model.heads[k].state_dict())
        self.edges = nn.ModuleDict()
        for e, (i, j) in enumerate(model.graph.edges):
            if self.kept.edges[e]:
                edge = ConvNormReLU(config.channels, config.channels, 3, 1, 1)
                edge.load_state_dict(model.edges[e].state_dict())
                self.edges[f"{i}-{j}"] = edge
        rows = (rows[k].tolist() for rows in model.gates.values(config.gates == "bare"))
        self._read_in, gates, self._read_out = rows
        self._gates = [
            gate / len(model.graph.incoming[j]) for gate, (_, j) in zip(gates, model.graph.edges, strict=True)
        ]
        self.train(model.training).to(model.heads[0].linear.weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(self.stem(images)).mean((2, 3)))

    def trunk(self, x: Tensor) -> Tensor:
        """The gated sum of the states that the task keeps."""
        states: dict[int, Tensor] = {}
        out: Tensor | None = None
        for j in self.kept.live_states:
            v = x * self._read_in[j] if self.kept.read_in[j] else None
            for e in self.kept.graph.incoming[j]:
                if self.kept.edges[e]:
                    i = self.kept.graph.edges[e][0]
                    v = _plus(v, self.edges[f"{i}-{j}"](states[i]), self._gates[e])
            states[j] = v
            if self.kept.read_out[j]:
                out = _plus(out, v, self._read_out[j])
        return out

    @property
    def parameters_count(self) -> int:
        """Learned numbers, batch norms, stem and head included."""
        return sum(parameter.numel() for parameter in self.parameters())


def _plus(total: Tensor | None, y: Tensor, gate: float) -> Tensor:
    if total is None:
        return y * gate
    return torch.add(total, y, alpha=gate) if torch.is_grad_enabled() else total.add_(y, alpha=gate)
