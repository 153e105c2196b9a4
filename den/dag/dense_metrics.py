"""Metrics of dense predictions on a set, collected batch by batch; shares and errors in 0..1, not per cent."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from den.dag.dense_losses import known_depth, known_normals
from den.nn.tasks import IGNORE

ANGLE_BINS = 18_000  # of a hundredth of a degree
THRESHOLDS = tuple(k / 100 for k in range(20, 91, 5))  # of probabilities: 0.2, 0.25 .. 0.9


class Collected:
    """Base of metrics, whose attributes are sums over what was added."""

    def take_in(self, other: Collected) -> None:
        """Add what another of the same class has collected."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class SegmentationMetrics(Collected):
    """`miou`: mean over the classes that occur, in targets or predictions, of intersection over union;
    `pixel_accuracy`: share of labelled pixels that are right.  Over all pixels of the set."""

    def __init__(self, classes: int) -> None:
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)  # [target, prediction]

    def add(self, logits: Tensor, labels: Tensor) -> None:  # [B, K, H, W], int64 [B, H, W]
        known, classes = labels != IGNORE, len(self.confusion)
        pairs = labels[known] * classes + logits.argmax(1)[known]
        self.confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()

    @property
    def count(self) -> int:
        """Pixels with a target so far."""
        return int(self.confusion.sum())

    def results(self) -> dict[str, float]:
        right = self.confusion.diagonal().double()
        union = self.confusion.sum(0) + self.confusion.sum(1) - right
        present = union > 0
        return {
            "miou": (right[present] / union[present]).mean().item(),
            "pixel_accuracy": (right.sum() / self.count).item(),
        }


class DepthMetrics(Collected):
    """`abs_error` in the unit of the target, `rel_error`: mean over pixels of |d - t| and |d - t| / t; `delta_1`,
    `delta_2`, `delta_3`: share of pixels with max(d / t, t / d) below 1.25, 1.25^2, 1.25^3."""

    def __init__(self) -> None:
        self.count = 0
        self._sums = torch.zeros(5, dtype=torch.float64)

    def add(self, depths: Tensor, target: Tensor) -> None:  # both [B, 1, H, W]
        known = known_depth(target)
        d, t = depths[known].double(), target[known].double()
        ratio = torch.where(d > 0, torch.maximum(d / t, t / d), torch.inf)
        within = [(ratio < 1.25**power).sum() for power in (1, 2, 3)]
        self._sums += torch.stack([(d - t).abs().sum(), ((d - t).abs() / t).sum(), *within]).double().cpu()
        self.count += d.numel()

    def results(self) -> dict[str, float]:
        names = ("abs_error", "rel_error", "delta_1", "delta_2", "delta_3")
        return dict(zip(names, (self._sums / self.count).tolist(), strict=True))


class NormalsMetrics(Collected):
    """Angle between prediction and target, over pixels: `mean_angle` and `median_angle` in degrees (the median to a
    hundredth); `within_11`, `within_22`, `within_30`: share of pixels below 11.25, 22.5 and 30 degrees."""

    def __init__(self) -> None:
        self.count = 0
        self._histogram = torch.zeros(ANGLE_BINS, dtype=torch.int64)
        self._sums = torch.zeros(4, dtype=torch.float64)

    def add(self, normals: Tensor, target: Tensor) -> None:  # both [B, 3, H, W]
        cosine = F.cosine_similarity(normals.double(), target.double(), dim=1)[known_normals(target)]
        angles = torch.rad2deg(cosine.clamp(-1, 1).acos())
        within = [(angles < limit).sum().double() for limit in (11.25, 22.5, 30)]
        self._sums += torch.stack([angles.sum(), *within]).cpu()
        bins = (angles * (ANGLE_BINS / 180)).long().clamp_max(ANGLE_BINS - 1)
        self._histogram += torch.bincount(bins, minlength=ANGLE_BINS).cpu()
        self.count += angles.numel()

    def results(self) -> dict[str, float]:
        middle = int((self._histogram.cumsum(0) * 2 >= self.count).nonzero()[0])
        mean, *within = (self._sums / self.count).tolist()
        names = ("within_11", "within_22", "within_30")
        median = (middle + 0.5) * 180 / ANGLE_BINS
        return {"mean_angle": mean, "median_angle": median, **dict(zip(names, within, strict=True))}


class EdgeMetrics(Collected):
    """`f_exact`: the best F-measure that one threshold for the whole set gives, precision and recall over all pixels,
    an edge found only if it lies on the very pixel.  The odsF of the literature thins the edges and lets them be off by
    a few pixels: it is higher, and not this number."""

    def __init__(self) -> None:
        self.count = 0
        self._counts = torch.zeros(3, len(THRESHOLDS), dtype=torch.float64)  # found and right, found, to be found

    def add(self, logits: Tensor, target: Tensor) -> None:  # both [B, 1, H, W]
        known = target != IGNORE
        self._counts += _counts(logits[known], target[known] == 1).cpu()
        self.count += int(known.sum())

    def results(self) -> dict[str, float]:
        right, found, wanted = self._counts
        return {"f_exact": (2 * right / (found + wanted).clamp_min(1)).max().item()}


class SaliencyMetrics(Collected):
    """`max_f`: the best over thresholds of the F-measure of the mean precision and the mean recall of the images;
    `miou`: the best over thresholds of the mean intersection over union of the images' salient pixels, as in the
    PASCAL-Context protocol (Maninis et al., CVPR 2019)."""

    def __init__(self) -> None:
        self.count = 0
        self._images = 0
        self._sums = torch.zeros(3, len(THRESHOLDS), dtype=torch.float64)  # of precision, recall, intersection / union

    def add(self, logits: Tensor, target: Tensor) -> None:  # both [B, 1, H, W]
        for values, truth in zip(logits, target, strict=True):
            known = truth != IGNORE
            if not known.any():
                continue
            right, found, wanted = _counts(values[known], truth[known] == 1)
            union = found + wanted - right
            shares = [torch.where(whole > 0, right / whole.clamp_min(1), 1.0) for whole in (found, wanted, union)]
            self._sums += torch.stack(shares).cpu()
            self._images += 1
            self.count += int(known.sum())

    def results(self) -> dict[str, float]:
        precision, recall, overlap = self._sums / self._images
        f = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
        return {"max_f": f.max().item(), "miou": overlap.max().item()}


def _counts(logits: Tensor, positive: Tensor) -> Tensor:
    """Pixels found and right, found, and to be found, at each threshold: float64 [3, T]."""
    found = logits.sigmoid().flatten() > torch.tensor(THRESHOLDS, device=logits.device)[:, None]  # [T, n]
    right = (found & positive.flatten()).sum(1)
    return torch.stack([right, found.sum(1), positive.sum().expand_as(right)]).double()
