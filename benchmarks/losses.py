"""Cases in which ours is not the fastest provider: against which one, and what the row tells about the reason."""

from collections.abc import Iterable
from typing import NamedTuple

from .targets import Row

SLACK = 1.02  # ours may take this much of the best alternative's time
LEAST_SAVING = 1.25  # FLOPs ratio of a fifth saved
TORCH = ("dense-eager", "dense-folded", "dense-compiled")
FIXED = 50e-6  # seconds: a difference below this is the cost of a call, not of its work


class Loss(NamedTuple):
    """A case in which something that anybody can run is faster than ours."""

    row: Row
    best: str
    factor: float  # our time over its time

    @property
    def counts(self) -> bool:
        """True where a fifth of the FLOPs is saved and yet the slack exceeded, which we said would not happen."""
        ratio = self.row["flops_ratio"]
        return self.factor > SLACK and (ratio is None or ratio >= LEAST_SAVING)


def best_alternative(row: Row) -> str | None:
    """The fastest provider that is neither ours, nor a floor, nor built on private operators."""
    others = {name: p["median"] for name, p in row["providers"].items() if p["role"] in ("dense", "alternative")}
    return min(others, key=others.__getitem__, default=None)


def loss_of(row: Row) -> Loss | None:
    """The case as a loss; None where ours is the fastest, or nothing else ran."""
    best = best_alternative(row)
    if best is None:
        return None
    factor = row["providers"]["ours"]["median"] / row["providers"][best]["median"]
    return Loss(row, best, factor) if factor > 1 else None


def losses(rows: Iterable[Row]) -> list[Loss]:
    """All of them, the worst first, those that save a fifth of the FLOPs before the others."""
    found = [loss for row in rows if "providers" in row and (loss := loss_of(row)) is not None]
    return sorted(found, key=lambda loss: (not loss.counts, -loss.factor))


def reason(loss: Loss) -> str:
    """Why, as far as the times of the same row show it."""
    row, providers = loss.row, loss.row["providers"]
    ours, other = providers["ours"], providers[loss.best]
    bare = providers.get(row["bare"]) if row["bare"] else None
    gap = ours["median"] - other["median"]
    spread = max(p["upper_quartile"] - p["lower_quartile"] for p in (ours, other))
    if gap < spread:
        return f"within the spread of the rounds ({1e6 * spread:.0f} us between quartiles)"
    ratio = row["flops_ratio"]
    if ratio is not None and ratio < LEAST_SAVING:
        return f"little to save ({ratio:.2f} times fewer FLOPs): what routing costs is not made up for"
    if gap < FIXED:
        return f"a fixed {1e6 * gap:.0f} us a call: sorting the instances, checks, and the step into C++"
    if bare is not None and bare["median"] > other["median"]:
        return "the convolutions of the levels alone take longer: narrow ones run at a lower rate"
    if bare is not None:
        return f"moving rows and batch norm take {100 * ours['overhead']:.0f} % above the bare convolutions"
    if loss.best in ("dense-openvino", "dense-onnxruntime"):
        torch = min((p["median"] for name, p in providers.items() if name in TORCH), default=None)
        share = "" if torch is None else f", in {other['median'] / torch:.2f} of the time of the fastest in PyTorch"
        return f"the engine runs the whole dense network in one call{share}"
    if loss.best == "dense-compiled":
        return "torch.compile fuses batch norm, ReLU and addition into the convolutions"
    return f"{1e3 * gap:.3g} ms that the times of this case do not explain"
