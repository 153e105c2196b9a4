"""Training steps in plain PyTorch over an estimator's own parameters: dense, and masked as dynamic networks do it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.nn.blocks import ElasticBlock
from den.nn.estimator import Estimator

from .peers import select_levels


def masked_norm(x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Batch norm of x [B, C, H, W] with statistics from sums over the used channels (mask bool [B, C]), else 0."""
    used = mask[:, :, None, None].to(x.dtype)
    count = (used.sum((0, 2, 3)) * x.shape[2] * x.shape[3]).clamp_min(1)
    mean = (x * used).sum((0, 2, 3)) / count
    centred = (x - mean[:, None, None]) * used
    scale = ((centred * centred).sum((0, 2, 3)) / count + eps).rsqrt() * weight
    return (centred * scale[:, None, None] + bias[:, None, None]) * used


class TrainingPass:
    """An estimator's forward pass in training mode at given structures, every channel computed.

    levels: integer [B, N], whose unused channels are multiplied by 0; None: the full structure, without any mask.
    In float64 the oracle.
    """

    def __init__(self, estimator: Estimator, task: int, levels: Tensor | None) -> None:  # levels: [B, N]
        self.estimator, self.task, self.levels = estimator, task, levels

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, c, S, S]."""
        x = self.estimator.stems[self.task](images)
        for i, block in enumerate(self.estimator.blocks):
            used = None if self.levels is None else select_levels(self.levels[:, i], block.conv1.out_groups)
            x = block.shortcut(x) + self._branch(block, x, used)
        norm = self.estimator.norm
        x = F.relu(F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps))
        return self.estimator.heads[self.task](x.mean((2, 3)))

    def _branch(self, block: ElasticBlock, x: Tensor, used: Tensor | None) -> Tensor:
        """The block's residual branch: x [B, C, H, W], used bool [B, M] (None: all) -> [B, C', H', W']."""
        if block.bn1 is not None:
            runs = None if used is None else used.any(1, keepdim=True).expand(-1, x.shape[1])
            x = F.relu(_norm(block.bn1, x, runs))
        hidden = F.conv2d(x, block.conv1.weight, None, block.stride, 1)
        return F.conv2d(F.relu(_norm(block.bn2, hidden, used)), block.conv2.weight, None, 1, 1)


def _norm(norm: nn.BatchNorm2d, x: Tensor, used: Tensor | None) -> Tensor:  # [B, C, H, W], [B, C]
    if used is None:
        return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
    return masked_norm(x, used, norm.weight, norm.bias, norm.eps)


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    """The loss [] and its gradients, each of its parameter's shape; none for parameters that it does not depend on."""
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    return [loss.detach(), *[gradient for gradient in found if gradient is not None]]
