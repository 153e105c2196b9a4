"""Blocks that gave up training: their weights are kept only as the kernel reads them."""

from collections.abc import Iterable

import torch
from torch import nn

from den_kernels import Route
from den_kernels.building import refuse_transforms, stand_in


def release(block: nn.Module, convs: Iterable[nn.Conv2d]) -> None:
    """Give up the weights of `convs`, of which shape, dtype and device are left, and the block's ``state_dict``."""
    for conv in convs:
        conv.weight = nn.Parameter(stand_in(conv.weight.detach()), requires_grad=False)
    block.register_state_dict_pre_hook(_refuse_to_save)


def check_use(block: nn.Module, route: Route | None) -> None:
    """ValueError unless a frozen block is run as it can be, RuntimeError inside torch.func."""
    if route is None or block.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        raise ValueError(f"{type(block).__name__}: a frozen block must run with a route and without gradients")
    refuse_transforms(type(block).__name__)


def check_mode(block: nn.Module, mode: bool) -> None:
    """ValueError for a frozen block's ``train()``."""
    if mode:
        raise ValueError(f"{type(block).__name__}: a frozen block must stay in eval mode, got train()")


def _refuse_to_save(*_: object) -> None:
    raise ValueError("state_dict: the network must not be frozen (its weights are gone), got a frozen one")
