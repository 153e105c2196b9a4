"""Losses of tasks that predict a value for every pixel.  Pixels without a target do not count; where no pixel has one
a loss is 0.  All raise ValueError for targets of another size than the predictions.

Where a batch is a share of a whole one, `count` says how many targets of the whole, in the mean over its shares, a
condition is true of; the mean of the shares' losses is then the loss of the whole batch.

What stands where there is no target: `IGNORE` in labels, edges and saliency, 0 in depths, the zero vector in normals.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from den.nn.tasks import IGNORE

Count = Callable[[Callable[[Tensor], Tensor]], Tensor]
DEPTH_FLOOR = 3e-5  # smaller depths are unknown, as in AdaShare (Sun et al., NeurIPS 2020)


def segmentation_loss(logits: Tensor, labels: Tensor, count: Count | None = None) -> Tensor:
    """Mean cross-entropy over pixels: logits [B, K, H, W], labels int64 [B, H, W] in 0..K-1 or `IGNORE`."""
    _check("segmentation_loss", labels, (len(logits), *logits.shape[2:]))
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / _number(labels, known_labels, count)


def depth_loss(depths: Tensor, target: Tensor, count: Count | None = None) -> Tensor:
    """Mean absolute error over pixels of known depth: both [B, 1, H, W]; in the unit of the target (AdaShare)."""
    _check("depth_loss", target, depths.shape)
    return ((depths - target).abs() * known_depth(target)).sum() / _number(target, known_depth, count)


def normals_loss(normals: Tensor, target: Tensor, count: Count | None = None) -> Tensor:
    """Mean of 1 - cosine of the angle between them: both [B, 3, H, W], of any lengths (AdaShare, MTAN)."""
    _check("normals_loss", target, normals.shape)
    errors = 1 - F.cosine_similarity(normals, target, dim=1)
    return (errors * known_normals(target)).sum() / _number(target, known_normals, count)


def balanced_loss(logits: Tensor, target: Tensor, count: Count | None = None) -> Tensor:
    """Cross-entropy of pixels that are 1 or 0, each kind weighted by the share of the other in the batch.

    logits [B, 1, H, W], target [B, 1, H, W] of 0, 1 or `IGNORE`.  Where the batch holds one kind only, so that its
    weight would be 0, the plain mean.  After holistically-nested edge detection (Xie and Tu, ICCV 2015).
    """
    _check("balanced_loss", target, logits.shape)
    known, positive = known_labels(target), target == 1
    number = _number(target, known_labels, count)
    share = (positive.sum() if count is None else count(lambda targets: targets == 1)) / number
    one_kind = (share == 0) | (share == 1)
    weight = torch.where(positive, 1 - share, share)
    weight = torch.where(one_kind, torch.ones_like(weight), weight)
    errors = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none")
    return (errors * weight * known).sum() / number


def known_labels(target: Tensor) -> Tensor:
    """True where a label, an edge or saliency is known: of the shape of the target."""
    return target != IGNORE


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


def _number(target: Tensor, is_known: Callable[[Tensor], Tensor], count: Count | None) -> Tensor:
    """Known pixels of a target [B, ...], or of the whole batch in the mean over its shares: number, 1 for none."""
    known = is_known(target).sum() if count is None else count(is_known)
    return torch.where(known > 0, known, 1)
