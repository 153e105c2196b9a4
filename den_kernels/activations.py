"""The activations of ops for inference, by name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
}
"""Each as a function, in the order of their numbers in csrc/activation.h."""


def check_activation(op: str, name: str, activation: str) -> None:
    """Raise ValueError for the name of no activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: {name} must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def number_of(activation: str) -> int:
    """The activation's number in csrc/activation.h."""
    return list(ACTIVATIONS).index(activation)
