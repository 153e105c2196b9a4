"""Losses of tasks that predict a value for every pixel.  Pixels without a target do not count; where no pixel has one
a loss is 0.  All raise ValueError for targets of another size than the predictions.

What stands where there is no target: `IGNORE` in labels, edges and saliency, 0 in depths, the zero vector in normals.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from den.nn.tasks import IGNORE

DEPTH_FLOOR = 3e-5  # smaller depths are unknown, as in AdaShare (Sun et al., NeurIPS 2020)


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over pixels: logits [B, K, H, W], labels int64 [B, H, W] in 0..K-1 or `IGNORE`."""
    _check("segmentation_loss", labels, (len(logits), *logits.shape[2:]))
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp_min(1)


def depth_loss(depths: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error over pixels of known depth: both [B, 1, H, W]; in the unit of the target (AdaShare)."""
    _check("depth_loss", target, depths.shape)
    return _mean((depths - target).abs(), known_depth(target))


def normals_loss(normals: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine of the angle between them: both [B, 3, H, W], of any lengths (AdaShare, MTAN)."""
    _check("normals_loss", target, normals.shape)
    return _mean(1 - F.cosine_similarity(normals, target, dim=1), known_normals(target))


def balanced_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of pixels that are 1 or 0, each kind weighted by the share of the other in the batch.

    logits [B, 1, H, W], target [B, 1, H, W] of 0, 1 or `IGNORE`.  Where the batch holds one kind only, so that its
    weight would be 0, the plain mean.  After holistically-nested edge detection (Xie and Tu, ICCV 2015).
    """
    _check("balanced_loss", target, logits.shape)
    known, positive = target != IGNORE, target == 1
    count = known.sum().clamp_min(1)
    share = positive.sum() / count
    one_kind = (share == 0) | (share == 1)
    weight = torch.where(positive, 1 - share, share)
    weight = torch.where(one_kind, torch.ones_like(weight), weight)
    errors = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none")
    return (errors * weight * known).sum() / count


def known_depth(target: Tensor) -> Tensor:
    """True where a depth of [B, 1, H, W] is known: above `DEPTH_FLOOR`."""
    return target > DEPTH_FLOOR


def known_normals(target: Tensor) -> Tensor:
    """True where a normal of [B, 3, H, W] is known, that is, not zero: bool [B, H, W]."""
    return target.abs().sum(1) > 0


def _check(op: str, target: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless the target has this shape."""
    if tuple(target.shape) != tuple(shape):
        raise ValueError(f"{op}: target must be {list(shape)} as the predictions, got {list(target.shape)}")


def _mean(errors: Tensor, known: Tensor) -> Tensor:  # of one shape, known bool -> []
    return (errors * known).sum() / known.sum().clamp_min(1)
