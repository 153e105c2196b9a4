"""Models written by others, small, with parameters and statistics unlike new ones, and what their blocks compute.

A family says where the hidden maps of its blocks are, for an oracle that knows nothing of how `convert` finds them.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from pytorchcv.models import (
    efficientnet,
    mobilenetv2,
    mobilenetv3,
    preresnet_cifar,
    regnet,
    resnet_cifar,
    resnext_cifar,
    seresnet_cifar,
    wrn_cifar,
)
from torch import Tensor, nn

from den_kernels.testing import channel_mask
from tests import stand_ins
from tests.oracle import unlike_new


@dataclass(frozen=True)
class Family:
    build: Callable[[], nn.Module]
    hidden: tuple[str, ...]
    """The modules of a block whose results are its hidden maps, behind norm and activation."""
    tail: str
    """The module whose result is the branch; "" where `branch` says what it is."""
    blocks: int
    size: int = 16
    channels: int = 1
    """The axis of the channels in the hidden maps."""
    separable: tuple[str, str] | None = None
    """The module of the hidden map, and that of the branch, in a separable convolution among the blocks."""

    def taps(self, block: nn.Module) -> tuple[tuple[str, ...], str]:
        """`hidden` and `tail` of a block."""
        if self.separable is not None and hasattr(block, self.separable[0]):
            return (self.separable[0],), self.separable[1]
        return self.hidden, self.tail


def _pooled(model: nn.Module) -> nn.Module:
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)
    return model


def _cifar(kind: type[nn.Module], channels: list[list[int]], **settings: object) -> Callable[[], nn.Module]:
    return lambda: _pooled(kind(channels=channels, init_block_channels=channels[0][0], **settings))


def _efficientnet() -> nn.Module:
    return efficientnet.EfficientNet(
        [[8], [12, 12], [16, 16]], 16, 32, [[3], [3, 3], [5, 5]], [1, 2, 2], [[1], [6, 6], [6, 6]]
    )


def _mobilenetv3() -> nn.Module:
    flags = [[1], [0, 0], [0, 0]]
    return _pooled(
        mobilenetv3.MobileNetV3(
            [[8], [12, 12], [16, 16]], [[16], [36, 48], [48, 64]], 8, 32, 32, [[1], [1, 1], [0, 0]], flags,
            [[1], [0, 1], [1, 1]], True, False,
        )
    )  # fmt: skip


BASIC, WIDE = [[16, 16], [32, 32]], [[64, 64], [128, 128]]
FAMILIES = {
    "pytorchcv_resnet": Family(
        _cifar(resnet_cifar.CIFARResNet, BASIC, bottleneck=False), ("body.conv1",), "body", 4
    ),
    "pytorchcv_resnet_bottleneck": Family(
        _cifar(resnet_cifar.CIFARResNet, WIDE, bottleneck=True), ("body.conv1", "body.conv2"), "body", 4
    ),
    "pytorchcv_preresnet": Family(
        _cifar(preresnet_cifar.CIFARPreResNet, BASIC, bottleneck=False), ("body.conv2.activ",), "body.conv2", 4
    ),
    "pytorchcv_preresnet_bottleneck": Family(
        _cifar(preresnet_cifar.CIFARPreResNet, WIDE, bottleneck=True),
        ("body.conv2.activ", "body.conv3.activ"), "body.conv3", 4,
    ),
    "pytorchcv_wrn": Family(_cifar(wrn_cifar.CIFARWRN, BASIC), ("body.conv2.activ",), "body.conv2", 4),
    "pytorchcv_resnext": Family(
        _cifar(resnext_cifar.CIFARResNeXt, WIDE, cardinality=8, bottleneck_width=32),
        ("body.conv1", "body.conv2"), "body", 4,
    ),
    "pytorchcv_seresnet": Family(
        _cifar(seresnet_cifar.CIFARSEResNet, BASIC, bottleneck=False), ("body.conv1",), "body", 4
    ),
    "pytorchcv_regnetx": Family(
        lambda: regnet.RegNet([[32, 32], [64]], 16, [8, 8], False), ("body.conv1", "body.conv2"), "body", 3
    ),
    "pytorchcv_regnety": Family(
        lambda: regnet.RegNet([[32, 32], [64]], 16, [8, 8], True), ("body.conv1", "body.conv2"), "body", 3
    ),
    "pytorchcv_mobilenetv2": Family(
        lambda: _pooled(mobilenetv2.MobileNetV2([[8], [12, 12], [16, 16]], 8, 32, False)),
        ("conv1", "conv2"), "conv3", 5,
    ),
    "pytorchcv_mobilenetv3": Family(_mobilenetv3, ("exp_conv", "conv1"), "conv2", 5, 32),
    "pytorchcv_efficientnet": Family(
        _efficientnet, ("conv1", "conv2"), "conv3", 5, separable=("dw_conv", "pw_conv")
    ),
    "torchvision_basic": Family(lambda: stand_ins.Network(stand_ins.PlainBasicBlock), ("relu",), "bn2", 3),
    "torchvision_bottleneck": Family(lambda: stand_ins.Network(stand_ins.PlainBottleneck), ("relu",), "bn3", 3),
    "torchvision_resnext": Family(
        lambda: stand_ins.Network(partial(stand_ins.PlainBottleneck, width=32, groups=8)), ("relu",), "bn3", 3
    ),
    "torchvision_mobilenetv2": Family(
        lambda: stand_ins.Network(stand_ins.InvertedResidual), ("conv.0", "conv.1"), "conv", 3
    ),
    "torchvision_mobilenetv2_narrow": Family(
        lambda: stand_ins.Network(partial(stand_ins.InvertedResidual, expand=1)), ("conv.0",), "conv", 3
    ),
    "torchvision_convnext": Family(
        lambda: stand_ins.Network(stand_ins.CNBlock, grows=False), ("block.4",), "block", 2, channels=3
    ),
    "timm": Family(lambda: stand_ins.Network(stand_ins.TimmBlock), ("conv1", "conv2"), "conv3", 3),
    "convnext_reshaped_scale": Family(
        lambda: stand_ins.Network(stand_ins.TimmConvNeXtBlock, grows=False), ("mlp.act",), "mlp", 2, channels=3
    ),
    "transformers": Family(
        lambda: stand_ins.Network(stand_ins.HuggingBottleneck), ("layer.0", "layer.1"), "layer", 3
    ),
}  # fmt: skip


def foreign(name: str) -> nn.Module:
    """The model in evaluation mode, with batch norms and layer scales unlike new ones."""
    model = unlike_new(FAMILIES[name].build())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("layer_scale", "gamma")):
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def images(name: str, batch: int = 6, seed: int = 0) -> Tensor:
    size = FAMILIES[name].size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def random_levels(batch: int, lowest: tuple[int, ...], groups: int, seed: int = 0) -> Tensor:
    """[B, N], from the lowest level of each block; the first instance at the lowest, the second at the top."""
    levels = torch.randint(0, groups + 1, (batch, len(lowest)), generator=torch.Generator().manual_seed(seed))
    levels[0], levels[1] = 0, groups
    return levels.maximum(torch.tensor(lowest))


@contextmanager
def masked(model: nn.Module, name: str, blocks: list[str], levels: Tensor, shares: tuple[int, ...]) -> Iterator[None]:
    """Inside the context the hidden channels that are not selected, and the branches at level 0, are 0 in every block.

    A block that uses one activation for several maps (torchvision) has as many hidden maps as it has batch norms less
    one: the activation of the sum behind them is left alone.
    """
    family = FAMILIES[name]
    with ExitStack() as stack:
        for n, path in enumerate(blocks):
            block = model.get_submodule(path)
            hidden, tail = family.taps(block)
            for tap in hidden:
                hook = _Mask(levels[:, n], shares, family, block if tap == "relu" else None)
                stack.callback(block.get_submodule(tap).register_forward_hook(hook).remove)
            close = _Close(levels[:, n])
            stack.callback(block.get_submodule(tail).register_forward_hook(close).remove)
        yield


class _Mask:
    def __init__(self, levels: Tensor, shares: tuple[int, ...], family: Family, block: nn.Module | None) -> None:
        self.levels, self.shares, self.family, self.calls = levels, shares, family, 0
        hidden = None if block is None else sum(isinstance(m, nn.BatchNorm2d) for m in block.children()) - 1
        self.hidden = hidden

    def __call__(self, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        self.calls += 1
        if self.hidden is not None and self.calls > self.hidden:
            return y
        axis = self.family.channels
        unit = y.shape[axis] // sum(self.shares)
        mask = channel_mask(self.levels, [share * unit for share in self.shares])
        shape = [1] * y.ndim
        shape[0], shape[axis] = mask.shape
        return torch.where(mask.view(shape), y, 0)


class _Close:
    def __init__(self, levels: Tensor) -> None:
        self.levels = levels

    def __call__(self, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        return torch.where((self.levels > 0).view(-1, *[1] * (y.ndim - 1)), y, 0)


def exact(model: nn.Module, name: str, blocks: list[str], x: Tensor, levels: Tensor, shares: tuple[int, ...]) -> Tensor:
    """float64, of a model that was not converted."""
    model = copy.deepcopy(model).double()
    with torch.no_grad(), masked(model, name, blocks, levels, shares):
        return model(x.double())
