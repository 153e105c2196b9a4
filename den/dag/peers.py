"""Networks that the DAG networks are compared with: one for each task, and cross-stitch networks, on the same graph.

A task runs the whole graph in both, so that their gates say nothing and rest.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.dag.gates import Gates
from den.dag.graph import SubGraph
from den.dag.head import head_flops, make_head
from den.dag.model_config import DagConfig
from den.dag.network import DagNetwork
from den.dag.stem import Stem, make_stem
from den.nn.modules import Modules
from den.nn.task_batch import Images, Tasks, task_batch
from den_kernels import DynamicBatchNorm2d


class PeerNetwork(nn.Module):
    """Base of networks that every task runs whole, with the interface that training and reports use.

    Arguments and results of ``forward(images, task)`` are those of `DagNetwork`.
    """

    def __init__(self, config: DagConfig) -> None:
        super().__init__()
        self.config, self.tasks, self.graph = config, config.tasks, config.graph
        self.gates = Gates(self.graph, len(config.tasks))

    def keep(self, task: int, kept: SubGraph) -> None:
        """Let a task keep only `kept` of the graph."""
        self.gates.keep(task, kept)

    def structure(self, task: int) -> SubGraph:
        """The sub-graph that a task keeps, less the items that lie on no path of it."""
        return self.gates.structure(task).clean()

    def used_edges(self) -> tuple[int, ...]:
        """All edges."""
        return tuple(range(len(self.graph.edges)))


class SeparateNetworks(PeerNetwork):
    """A network of its own for each task; nothing is shared."""

    def __init__(self, config: DagConfig) -> None:
        super().__init__(config)
        alone = [replace(config, tasks=(task,)) for task in config.tasks]
        self.networks: Modules[DagNetwork] = Modules(DagNetwork(each) for each in alone)
        for network in self.networks:
            network.gates.requires_grad_(False)

    def keep(self, task: int, kept: SubGraph) -> None:
        super().keep(task, kept)
        self.networks[task].keep(0, kept)

    def forward(self, images: Images, task: Tasks) -> Tensor | list[Tensor]:
        batch = task_batch(images, task, self.tasks, like=self.gates.gamma)
        outputs = [self.networks[k](part, 0) for k, part in zip(batch.tasks, batch.images, strict=True)]
        return batch.restore_logits(outputs, max(known.classes for known in self.tasks))


class CrossStitchNetwork(PeerNetwork):
    """A column for each task, the columns' states mixed after every state (Misra et al., CVPR 2016).

        v_j[t] = sum over s of stitches[j, t, s] * (x_s + (1 / In_j) sum over edges (i, j) of e_ij[s](v_i[s]))

    Every column sees every image, through a stem of its own; the head of an image's task reads the column of its task.
    Stitches are per channel, 0.9 within a column and 0.1 / (K - 1) between two at first.  Columns lie side by side in
    the channels, and an edge is one convolution with a group for each.

    Raises ValueError for tasks whose images differ in shape, dense tasks, stages, channel groups and residual blocks.
    """

    def __init__(self, config: DagConfig) -> None:
        super().__init__(config)
        K, C, edges = len(config.tasks), config.channels, self.graph.edges
        shapes = sorted({task.shape for task in config.tasks})
        plain = config.groups == 1 and config.edge == "conv" and not config.stages
        if len(shapes) > 1 or not plain or any(task.dense for task in config.tasks):
            raise ValueError(
                "CrossStitchNetwork: tasks must classify images of one shape, without stages, groups and blocks,"
                f" got images of {shapes}"
            )
        self.stems: Modules[Stem] = Modules(make_stem(task, config) for task in config.tasks)
        self.convs: Modules[nn.Conv2d] = Modules(
            nn.Conv2d(K * C, K * C, 3, padding=1, groups=K, bias=False) for _ in self.graph.edges
        )
        self.norms = nn.ModuleList(DynamicBatchNorm2d(K * C) for _ in edges)
        self.heads: Modules[nn.Module] = Modules(make_head(task, config) for task in config.tasks)
        for conv in self.convs:
            nn.init.normal_(conv.weight, std=(2 / (9 * C)) ** 0.5)  # kaiming of one column's fan
        own = torch.eye(K)[:, :, None]
        mixed = 0.9 * own + (1 - own) * 0.1 / (K - 1) if K > 1 else own
        self.stitches = nn.Parameter(mixed.expand(self.graph.states, K, K, C).clone())

    def forward(self, images: Images, task: Tasks) -> Tensor | list[Tensor]:
        batch = task_batch(images, task, self.tasks, like=self.gates.gamma)
        x = torch.cat(batch.images)
        pooled = self.trunk(torch.cat([stem(x) for stem in self.stems], 1)).mean((3, 4)).split(batch.sizes)
        outputs = [self.heads[k](part[:, k]) for k, part in zip(batch.tasks, pooled, strict=True)]
        return batch.restore_logits(outputs, max(known.classes for known in self.tasks))

    def trunk(self, x: Tensor) -> Tensor:  # [B, K * C, H, W] -> [B, K, C, H, W]
        """The sum of all stitched states, column by column."""
        K, C = len(self.tasks), self.config.channels
        states: list[Tensor] = []
        for j, incoming in enumerate(self.graph.incoming):
            v = x
            for e in incoming:
                y = F.relu(self.norms[e](self.convs[e](states[self.graph.edges[e][0]])))
                v = v + y / len(incoming)
            stitched = torch.einsum("bschw,tsc->btchw", v.unflatten(1, (K, C)), self.stitches[j].to(v.dtype))
            states.append(stitched.flatten(1, 2))
        return torch.stack(states).sum(0).unflatten(1, (K, C))

    def flops(self, task: int) -> int:
        """Twice the multiply-adds for one image: all columns and stitches, and the head of its task."""
        height, width = self.config.map_size()
        weights = sum(conv.weight.numel() for conv in self.convs) + self.stitches.numel()
        stems = sum(stem.flops() for stem in self.stems)
        head = head_flops(self.heads[task], self.tasks[task], self.config)
        return stems + 2 * weights * height * width + head
