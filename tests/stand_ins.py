"""Blocks as packages write them that cannot be installed beside this torch: small copies, faithful in their forward.

`Plain...` and `Inverted...` are written as torchvision does, `Timm...` as timm does, `Hugging...` as transformers does.
"""

from functools import partial

import torch
from torch import Tensor, nn


class PlainBasicBlock(nn.Module):
    """torchvision.models.resnet.BasicBlock"""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class PlainBottleneck(nn.Module):
    """torchvision.models.resnet.Bottleneck, with cardinality"""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, width: int = 16, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class InvertedResidual(nn.Module):
    """torchvision.models.mobilenetv2.InvertedResidual"""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, expand: int = 4) -> None:
        super().__init__()
        hidden = inplanes * expand
        self.use_res_connect = stride == 1 and inplanes == planes
        layers: list[nn.Module] = []
        if expand > 1:
            expansion = [nn.Conv2d(inplanes, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
            layers.append(nn.Sequential(*expansion))
        depthwise = [nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden)]
        layers += [nn.Sequential(*depthwise, nn.ReLU6(inplace=True)), nn.Conv2d(hidden, planes, 1, bias=False)]
        self.conv = nn.Sequential(*layers, nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class Permute(nn.Module):
    """torchvision.ops.misc.Permute"""

    def __init__(self, dims: list[int]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return torch.permute(x, self.dims)


class StochasticDepth(nn.Module):
    """torchvision.ops.StochasticDepth, by rows"""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        noise = torch.empty(x.shape[0], *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - self.p)
        return x * noise.div_(1 - self.p)


class CNBlock(nn.Module):
    """torchvision.models.convnext.CNBlock"""

    def __init__(self, dim: int, stride: int = 1, layer_scale: float = 1e-6) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(dim, dim, 7, padding=3, groups=dim),
            Permute([0, 2, 3, 1]),
            nn.LayerNorm(dim, eps=1e-6),
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.Linear(4 * dim, dim),
            Permute([0, 3, 1, 2]),
        )
        self.layer_scale = nn.Parameter(torch.ones(dim, 1, 1) * layer_scale)
        self.stochastic_depth = StochasticDepth(0.1)

    def forward(self, x: Tensor) -> Tensor:
        result = self.layer_scale * self.block(x)
        result = self.stochastic_depth(result)
        result += x
        return result


class TimmBatchNormAct2d(nn.BatchNorm2d):
    """timm.layers.BatchNormAct2d: the activation is inside the norm"""

    def __init__(self, channels: int, act: bool = True) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class TimmBlock(nn.Module):
    """timm.models.regnet.Bottleneck and its like: norms hold their activations, the last one starts with weight 0"""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Sequential()
        self.conv1.conv, self.conv1.bn = nn.Conv2d(inplanes, planes, 1, bias=False), TimmBatchNormAct2d(planes)
        self.conv2 = nn.Sequential()
        self.conv2.conv = nn.Conv2d(planes, planes, 3, stride, 1, groups=4, bias=False)
        self.conv2.bn = TimmBatchNormAct2d(planes)
        self.conv3 = nn.Sequential()
        self.conv3.conv, self.conv3.bn = nn.Conv2d(planes, planes, 1, bias=False), TimmBatchNormAct2d(planes, act=False)
        nn.init.zeros_(self.conv3.bn.weight)
        self.downsample = nn.Conv2d(inplanes, planes, 1, stride) if stride != 1 or inplanes != planes else nn.Identity()
        self.drop_path = nn.Identity()
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv3(self.conv2(self.conv1(x)))
        x = self.drop_path(x) + self.downsample(shortcut)
        return self.act3(x)


class TimmMlp(nn.Module):
    """timm.layers.Mlp"""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(channels, hidden), nn.GELU(), nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(hidden, channels), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class TimmConvNeXtBlock(nn.Module):
    """timm.models.convnext.ConvNeXtBlock: the layer scale is reshaped in every call"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm, self.mlp = nn.LayerNorm(channels, eps=1e-6), TimmMlp(channels, 4 * channels)
        self.gamma = nn.Parameter(1e-6 * torch.ones(channels))
        self.shortcut, self.drop_path = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv_dw(x).permute(0, 2, 3, 1)
        x = self.mlp(self.norm(x)).permute(0, 3, 1, 2)
        x = x.mul(self.gamma.reshape(1, -1, 1, 1))
        return self.drop_path(x) + self.shortcut(shortcut)


class HuggingConvLayer(nn.Module):
    """transformers.models.resnet.ResNetConvLayer"""

    def __init__(self, inplanes: int, planes: int, kernel: int, stride: int = 1, act: bool = True) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inplanes, planes, kernel, stride, kernel // 2, bias=False)
        self.normalization = nn.BatchNorm2d(planes)
        self.activation = nn.ReLU() if act else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        hidden_state = self.convolution(input)
        hidden_state = self.normalization(hidden_state)
        return self.activation(hidden_state)


class HuggingBottleneck(nn.Module):
    """transformers.models.resnet.ResNetBottleNeckLayer"""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        narrow = planes // 4
        self.shortcut = nn.Identity()
        if stride != 1 or inplanes != planes:
            self.shortcut = HuggingConvLayer(inplanes, planes, 1, stride, act=False)
        self.layer = nn.Sequential(
            HuggingConvLayer(inplanes, narrow, 1),
            HuggingConvLayer(narrow, narrow, 3, stride),
            HuggingConvLayer(narrow, planes, 1, act=False),
        )
        self.activation = nn.ReLU()

    def forward(self, hidden_state: Tensor) -> Tensor:
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        return self.activation(hidden_state)


class Network(nn.Module):
    """A stem, blocks of one kind of 16, 16 and 32 channels, and a head."""

    def __init__(self, block: type[nn.Module] | partial, grows: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        last = [block(16, 32, stride=2), block(32, 32)] if grows else [block(16)]
        self.layers = nn.Sequential(block(16, 16) if grows else block(16), *last)
        self.fc = nn.Linear(32 if grows else 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


class PlainResNet18(nn.Module):
    """torchvision.models.resnet18, of `width` channels in the first stage (there 64)."""

    def __init__(self, num_classes: int = 1000, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for stage in range(4):
            planes = width * 2**stage
            first = PlainBasicBlock(width if stage == 0 else planes // 2, planes, 1 if stage == 0 else 2)
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, PlainBasicBlock(planes, planes)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))
