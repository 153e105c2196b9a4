"""The stems and the heads of a mixed batch for inference: of all its tasks in a few products, not one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.dag.head import ClassHead
from den.dag.stem import DagStem
from den.nn.folding import folded_weight
from den_kernels.building import norm_affine


@dataclass(frozen=True, eq=False)
class MixedEnds:
    """Stems and heads of K classification tasks whose images are of one size, batch norms folded in.

    A task alone makes a dozen small calls, which at a few images cost more than what they compute.
    """

    stem_weight: Tensor  # [K, c * R * S, C]
    stem_bias: Tensor  # [K, 1, C]
    head_weight: Tensor  # [K, C, most classes], zeros beyond a task's own
    head_bias: Tensor  # [K, 1, most classes]
    classes: tuple[int, ...]
    geometry: tuple[int, int, int]  # kernel, stride and padding of the stems

    @staticmethod
    def fit(stems: Sequence[object], heads: Sequence[object], images: Sequence[Tensor]) -> bool:
        """True where the tasks of a batch can share one pass: stems and heads differ in their weights only.

        images: one tensor [n, c, S, S] for each task, all of one shape.
        """
        if len(images) < 2 or any(part.shape != images[0].shape for part in images) or not len(images[0]):
            return False
        if not all(isinstance(stem, DagStem) for stem in stems) or not all(isinstance(h, ClassHead) for h in heads):
            return False
        return all(stem.in_size == images[0].shape[-1] for stem in stems if isinstance(stem, DagStem))

    @staticmethod
    def modules(stems: Sequence[DagStem], heads: Sequence[ClassHead]) -> tuple[nn.Module, ...]:
        """The modules that hold what the folded tensors depend on."""
        of_stems = (module for stem in stems for module in (stem.conv.conv, stem.conv.norm))
        return (*of_stems, *(module for head in heads for module in (head.linear, head.norm)))

    @staticmethod
    def fold(stems: Sequence[DagStem], heads: Sequence[ClassHead]) -> MixedEnds:
        """Fold the batch norms of stems and heads in eval mode, and stack the tasks' weights."""
        convolutions = [folded_weight(stem.conv.conv, stem.conv.norm) for stem in stems]
        conv, most = stems[0].conv.conv, max(head.linear.out_features for head in heads)
        weights, biases = [], []
        for head in heads:
            linear, spare = head.linear, most - head.linear.out_features
            scale, shift = norm_affine(head.norm, linear.weight.dtype)
            weights.append(F.pad((linear.weight.detach() * scale).T, (0, spare)))
            biases.append(F.pad(linear.bias.detach() + linear.weight.detach() @ shift, (0, spare)))
        return MixedEnds(
            torch.stack([weight.flatten(1).T for weight, _ in convolutions]),
            torch.stack([bias for _, bias in convolutions]).unsqueeze(1),
            torch.stack(weights).to(conv.weight.dtype),
            torch.stack(biases).unsqueeze(1).to(conv.weight.dtype),
            tuple(head.linear.out_features for head in heads),
            (conv.kernel_size[0], conv.stride[0], int(conv.padding[0])),
        )

    def stem(self, images: Sequence[Tensor]) -> Tensor:
        """K tensors [n, c, S, S] -> maps [K * n, C, H, W], channels-last, one task after the other."""
        kernel, stride, padding = self.geometry
        count = len(images[0])
        side = (images[0].shape[-1] + 2 * padding - kernel) // stride + 1
        x = torch.cat(tuple(images)).contiguous()
        if padding == 0 and kernel == stride == x.shape[-1] // side:  # the windows lie side by side
            windows = x.view(*x.shape[:2], side, kernel, side, kernel).permute(0, 2, 4, 1, 3, 5)
        else:
            windows = F.unfold(x, kernel, 1, padding, stride).transpose(1, 2)  # [K * n, H * W, c * R * S]
        rows = windows.reshape(len(images), count * side * side, -1)
        maps = torch.baddbmm(self.stem_bias, rows, self.stem_weight).relu_()  # [K, n * H * W, C]
        return maps.view(len(images) * count, side, side, -1).permute(0, 3, 1, 2)

    def head(self, pooled: Tensor) -> list[Tensor]:
        """Pooled features [K * n, C] -> the logits [n, classes] of each task."""
        rows = pooled.view(len(self.classes), -1, pooled.shape[1])
        logits = torch.baddbmm(self.head_bias, rows, self.head_weight)
        return [part[:, :classes] for part, classes in zip(logits, self.classes, strict=True)]
