"""FLOPs of a converted model, by block and level."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .carrier import carrier_of
from .layers import Routed
from .record import Node, example_of, record

_OP = "level_flops"


@dataclass(frozen=True)
class LevelFlops:
    """Twice the multiply-adds of a model for one image.

    blocks: int64 [N, G + 1], of the layers that know the levels, of each block at each level. Below the lowest level of
    a block they are its own.
    rest: of all other convolutions and linear layers.
    """

    blocks: Tensor
    rest: int

    @property
    def full(self) -> int:
        """FLOPs with all channel groups."""
        return int(self.blocks[:, -1].sum()) + self.rest

    def of(self, levels: Tensor) -> Tensor:
        """FLOPs of structures [..., N]: int64 [...]."""
        return self.blocks[torch.arange(len(self.blocks)), levels.cpu().long()].sum(-1) + self.rest


def level_flops(model: nn.Module, example: Tensor | tuple | Mapping[str, Any] | None = None) -> LevelFlops:
    """The FLOPs of a converted model's convolutions and linear layers, from the shapes of a recorded run.

    example: as `convert` takes it; its first image counts. Raises ValueError for a model that was not converted.
    """
    shared = carrier_of(model, _OP).shared
    with torch.random.fork_rng(devices=[]):
        recording = record(model, *example_of(model, example, _OP))
    table = torch.zeros(len(shared.blocks), shared.groups + 1, dtype=torch.int64)
    rest = 0
    for node in recording.nodes:
        if not isinstance(node.target, (nn.Conv2d, nn.Linear)):
            continue
        if isinstance(node.target, Routed):
            table[node.target.block] += torch.tensor([_flops(node, level) for level in range(shared.groups + 1)])
        else:
            rest += _flops(node, None)
    for n, block in enumerate(shared.blocks):
        table[n, : block.lowest] = table[n, block.lowest]
    return LevelFlops(table, rest)


def _flops(node: Node, level: int | None) -> int:
    """FLOPs of a layer for one image; level: of an elastic layer."""
    module: Any = node.target
    outs, per_out = module.weight.shape[:2]
    cardinality, shape = getattr(module, "groups", 1), node.shape
    assert shape is not None
    pixels = shape[2:].numel() if isinstance(module, nn.Conv2d) else shape[1:-1].numel()
    taps = module.weight.shape[2:].numel()
    if level is not None:
        kept = sum(module.out_groups[:level]) if module.out_groups else outs
        ins = sum(module.in_groups[:level]) if module.in_groups else per_out * cardinality
        if cardinality > 1 and module.in_groups and not module.out_groups:
            kept = outs * ins // (per_out * cardinality)
        outs, per_out = kept, per_out if cardinality > 1 else ins
    return 2 * pixels * taps * outs * per_out
