"""Initial weights of convolutions."""

import torch
from torch import nn


@torch.no_grad()
def initialise(conv: nn.Conv2d) -> None:
    """He's initialisation (fan-out) for a ReLU; an input of a grouped convolution reaches only its group's outputs."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.groups > 1:
        conv.weight.mul_(conv.groups**0.5)
