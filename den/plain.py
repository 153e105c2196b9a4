"""The full structure as a plain network, as anybody would write it: what a Deep Elastic Network is timed against."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.blocks import ElasticBlock
from den.folding import norm_tensors
from den.model import DeepElasticNetwork
from den.tasks import find_task


class PlainNetwork(nn.Module):
    """One task's estimator at its full structure, for inference: ordinary convolutions, channels-last, without levels.

    Equivalent to ``model.estimator(images, task)`` in eval mode.  The second batch norm of every block is folded into
    the convolution before it; the first stands before a ReLU and cannot be.  Block weights are copied; stem and head
    are the model's own.
    """

    def __init__(self, model: DeepElasticNetwork, task: str) -> None:
        super().__init__()
        estimator, k = model.estimator, find_task(task, model.tasks)
        self.stem, self.head, self.norm = estimator.stems[k], estimator.heads[k], estimator.norm
        self.blocks = nn.ModuleList(PlainBlock(block) for block in estimator.blocks)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:  # [B, C, S, S] -> [B, classes]
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu_(self.norm(x)).mean((2, 3)))


class PlainBlock(nn.Module):
    """``shortcut(x) + conv2(relu(conv1(relu(bn1(x)))))``, conv1 with bn2 folded in."""

    def __init__(self, block: ElasticBlock) -> None:
        super().__init__()
        self.conv1, self.conv2 = _plain(block.conv1), _plain(block.conv2)
        weight, bias, mean, var = (tensor.detach() for tensor in norm_tensors(block.bn2))
        scale = weight * torch.rsqrt(var + block.bn2.eps)
        self.conv1.weight = nn.Parameter(self.conv1.weight.detach() * scale[:, None, None, None])
        self.conv1.bias = nn.Parameter(bias - mean * scale)
        self.bn1 = nn.Identity() if block.bn1 is None else _norm_relu(block.bn1)
        self.shortcut = block.shortcut
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu_(self.conv1(self.bn1(x)))
        return self.conv2(hidden).add_(self.shortcut(x))


def _plain(conv: nn.Conv2d) -> nn.Conv2d:
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, 3, conv.stride, 1, bias=False)
    plain.weight = nn.Parameter(conv.weight.detach().clone())
    return plain


def _norm_relu(norm: nn.BatchNorm2d) -> nn.Sequential:
    plain = nn.BatchNorm2d(norm.num_features, norm.eps)
    plain.load_state_dict(norm.state_dict())
    return nn.Sequential(plain, nn.ReLU(inplace=True))
