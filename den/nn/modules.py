"""Lists of modules of one class, as type checkers see them; layout and initial weights of convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class Modules(nn.ModuleList, Generic[M]):
    """An `nn.ModuleList` whose items are of class M: ``self.edges: Modules[Edge] = Modules(...)``."""

    if TYPE_CHECKING:

        def __getitem__(self, index: int) -> M: ...  # type: ignore[override]

        def __iter__(self) -> Iterator[M]: ...


def lay_out_channels_last(module: nn.Module) -> None:
    """Lay out the convolution weights [out, in, R, S] of a module channels-last in memory, in place."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@torch.no_grad()
def initialise(conv: nn.Conv2d) -> None:
    """He's initialisation (fan-out) for a ReLU; an input of a grouped convolution reaches only its group's outputs."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.groups > 1:
        conv.weight.mul_(conv.groups**0.5)
