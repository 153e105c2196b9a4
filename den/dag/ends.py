"""The stems and the heads of a mixed batch for inference: of all its tasks in a few products, not one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from den.dag.head import ClassHead
from den.dag.stem import DagStem
from den.folding import folded_weight, norm_affine, norm_tensors


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
        """Whether the tasks of a batch can go together: alike but for their weights, as many images of each."""
        if len(images) < 2 or any(part.shape != images[0].shape for part in images) or not len(images[0]):
            return False
        if not all(isinstance(stem, DagStem) for stem in stems) or not all(isinstance(h, ClassHead) for h in heads):
            return False
        return all(stem.in_size == images[0].shape[-1] for stem in stems)

    @staticmethod
    def sources(stems: Sequence[DagStem], heads: Sequence[ClassHead]) -> tuple[Tensor, ...]:
        """The tensors that the folded ones depend on."""
        of_stems = (t for stem in stems for t in (stem.conv.conv.weight, *norm_tensors(stem.conv.norm)))
        of_heads = (t for head in heads for t in (head.linear.weight, head.linear.bias, *norm_tensors(head.norm)))
        return (*of_stems, *of_heads)

    @staticmethod
    def fold(stems: Sequence[DagStem], heads: Sequence[ClassHead]) -> MixedEnds:
        """The products of the tasks, from their modules in eval mode."""
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
            (conv.kernel_size[0], conv.stride[0], conv.padding[0]),
        )

    def stem(self, images: Sequence[Tensor]) -> Tensor:
        """K tensors [n, c, S, S] -> maps [K * n, C, H, W], channels-last, one task after the other."""
        kernel, stride, padding = self.geometry
        count = len(images[0])
        side = (images[0].shape[-1] + 2 * padding - kernel) // stride + 1
        windows = F.unfold(torch.cat(tuple(images)), kernel, 1, padding, stride)  # [K * n, c * R * S, H * W]
        rows = windows.transpose(1, 2).reshape(len(images), count * side * side, -1)
        maps = torch.baddbmm(self.stem_bias, rows, self.stem_weight).relu_()  # [K, n * H * W, C]
        return maps.view(len(images) * count, side, side, -1).permute(0, 3, 1, 2)

    def head(self, pooled: Tensor) -> list[Tensor]:
        """Pooled features [K * n, C] -> the logits [n, classes] of each task."""
        rows = pooled.view(len(self.classes), -1, pooled.shape[1])
        logits = torch.baddbmm(self.head_bias, rows, self.head_weight)
        return [part[:, :classes] for part, classes in zip(logits, self.classes, strict=True)]
