"""The full structure as a plain network of ordinary convolutions: the baseline of all times."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from den.nn.blocks import BottleneckBlock, ConvPair, ElasticBlock, LinearPair
from den.nn.ends import features
from den.nn.folding import folded_weight
from den.nn.model import DeepElasticNetwork
from den.nn.task_batch import find_task


class PlainNetwork(nn.Module):
    """One task's estimator at its full structure, for inference: ordinary convolutions, channels-last, without levels.

    Equivalent to `model.estimator(images, task)` in eval mode. Every batch norm that follows a convolution is folded
    into it; the first of a residual block stands before a ReLU and cannot be. Block weights are copied; stem, head and
    what stands before the head are the model's own.
    """

    def __init__(self, model: DeepElasticNetwork, task: str) -> None:
        super().__init__()
        estimator, k = model.estimator, find_task(task, model.tasks)
        self.stem, self.head = estimator.stem_of(k), estimator.heads[k]
        self.norm, self.shared = estimator.norm, estimator.shared
        self.blocks = nn.ModuleList(PLAIN[type(block)](block) for block in estimator.blocks)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:  # [B, C, S, S] -> [B, classes]
        """Logits of the images."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(features(x, self.norm, self.shared))


class PlainResidual(nn.Module):
    """`shortcut(x) + conv(... relu(conv(relu(bn1(x)))))`, the inner batch norms folded."""

    def __init__(self, block: ElasticBlock | BottleneckBlock) -> None:
        super().__init__()
        first = [] if block.bn1 is None else [_plain_norm(block.bn1), nn.ReLU(inplace=True)]
        *inner, (last, _) = block.layers()
        hidden = [module for conv, norm in inner for module in (_plain_conv(conv, norm), nn.ReLU(inplace=True))]
        self.branch = nn.Sequential(*first, *hidden, _plain_conv(last, None))
        self.shortcut = block.shortcut

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, channels, H', W']
        """Run the block at its full width."""
        return self.branch(x).add_(self.shortcut(x))


def plain_pair(block: ConvPair) -> nn.Sequential:
    """`pool(relu(conv(pool(relu(conv(x))))))`, both batch norms folded."""
    plain = nn.Sequential()
    for (conv, norm), pools in zip(block.layers(), block.pools, strict=True):
        plain.extend([_plain_conv(conv, norm), nn.ReLU(inplace=True), *([nn.MaxPool2d(2)] if pools else [])])
    return plain


def plain_linear_pair(block: LinearPair) -> nn.Sequential:
    """`relu(fc2(relu(fc1(flatten(x)))))`: [B, C, H, W] -> [B, channels]."""
    layers = [module for layer, _ in block.layers() for module in (_plain_linear(layer), nn.ReLU(inplace=True))]
    return nn.Sequential(nn.Flatten(), *layers)


PLAIN: dict[type[nn.Module], Callable[..., nn.Module]] = {
    ElasticBlock: PlainResidual,
    BottleneckBlock: PlainResidual,
    ConvPair: plain_pair,
    LinearPair: plain_linear_pair,
}


def _plain_conv(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> nn.Conv2d:
    kernel, stride, padding = cast(Sequence[tuple[int, int]], (conv.kernel_size, conv.stride, conv.padding))
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, kernel, stride, padding, groups=conv.groups,
        bias=norm is not None, device="meta",
    )  # fmt: skip
    if norm is None:
        plain.weight = nn.Parameter(conv.weight.detach().clone(memory_format=torch.channels_last))
    else:
        weight, bias = folded_weight(conv, norm)
        plain.weight, plain.bias = nn.Parameter(weight), nn.Parameter(bias)
    return plain


def _plain_linear(layer: nn.Conv2d) -> nn.Linear:
    """A 1x1 convolution with a bias as a fully connected layer."""
    assert layer.bias is not None
    plain = nn.Linear(layer.in_channels, layer.out_channels, device="meta")
    plain.weight = nn.Parameter(layer.weight.detach().flatten(1).clone())
    plain.bias = nn.Parameter(layer.bias.detach().clone())
    return plain


def _plain_norm(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, device=norm.weight.device, dtype=norm.weight.dtype)
    plain.load_state_dict(norm.state_dict())
    return plain
