"""A Deep Elastic Network beside its dense baseline: what is compared, the table, and the conclusions in words."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from den.data import ImageSet
from den.evaluate.accuracy import TaskReport, evaluate, full_flops, static_candidates
from den.evaluate.timing import Timing, time_per_image
from den.nn.model import DeepElasticNetwork
from den.support.files import write_text

SAME_COST = 1.03  # a static structure may cost 3 % more than the network that it is compared with


@dataclass(frozen=True, eq=False)
class Comparison:
    """Results of one task, all on its test images."""

    images: ImageSet
    dense: TaskReport  # the dense baseline
    full: TaskReport  # the elastic network, at its full structure
    selected: TaskReport  # the elastic network, at the structures of its selector
    statics: tuple[TaskReport, ...]  # the elastic network, at one structure for all images
    timing: Timing  # of the elastic network

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.images.name

    @property
    def affordable(self) -> list[TaskReport]:
        """The static structures that cost no more than what the selector chose."""
        return [s for s in self.statics if s.flops <= SAME_COST * self.selected.flops]

    @property
    def best_static(self) -> TaskReport:
        """The most accurate of them, picked on these very test images, which favours it."""
        return max(self.affordable, key=lambda s: (s.accuracy, -s.loss))

    @property
    def saving(self) -> float:
        """FLOPs of the full structure over those of the chosen ones."""
        return 1 / max(self.selected.flops_ratio, 1e-9)


def compare(
    dense: DeepElasticNetwork, elastic: DeepElasticNetwork, sets: Sequence[ImageSet], near: int, spread: int
) -> list[Comparison]:
    """Compare two trained networks on test sets.

    near, spread: how many static structures to try at the cost that the selector chose, and at costs of all kinds; the
    structures that the selector uses most are tried too.
    """
    baseline, full, selected = evaluate(dense, sets, "full"), evaluate(elastic, sets, "full"), evaluate(elastic, sets)
    found = []
    for image_set in sets:
        name = image_set.name
        structures = static_structures(elastic, selected[name], near, spread)
        statics = tuple(evaluate(elastic, [image_set], structure)[name] for structure in structures)
        timing = time_per_image(elastic, image_set)
        found.append(Comparison(image_set, baseline[name], full[name], selected[name], statics, timing))
    return found


def static_structures(model: DeepElasticNetwork, selected: TaskReport, near: int, spread: int) -> Tensor:
    """Structures to be tried for all images of a task, one of them for free: int64 [n, N], without repetition."""
    budgets = torch.linspace(0.15, 0.95, max(spread // 2, 1)) * full_flops(model)
    tried = [static_candidates(model, budget.item(), 2, 0.03, seed) for seed, budget in enumerate(budgets)]
    tried += [static_candidates(model, selected.flops, near, SAME_COST - 1, len(budgets)), selected.common[0][:10]]
    tried += [torch.zeros(1, model.num_blocks, dtype=torch.int64)]
    return torch.cat(tried).unique(dim=0)


def table(found: Sequence[Comparison]) -> str:
    """The table, a column per task."""
    rows: list[tuple[str, list[str]]] = [("", [c.task for c in found])]

    def row(title: str, cell: Any) -> None:
        rows.append((title, [cell(c) for c in found]))

    row("test images", lambda c: f"{c.dense.images:,}")
    row("accuracy, dense baseline", lambda c: f"{c.dense.accuracy:.2%}")
    row("accuracy, Deep Elastic Network", lambda c: f"{c.selected.accuracy:.2%}")
    row("  difference in points", lambda c: f"{100 * (c.selected.accuracy - c.dense.accuracy):+.2f}")
    row("MFLOP per image, dense", lambda c: f"{c.dense.flops / 1e6:.1f}")
    row("MFLOP per image, DEN (mean)", lambda c: f"{c.selected.flops / 1e6:.1f}")
    row("  times fewer", lambda c: f"{c.saving:.2f}")
    row("us per image, dense", lambda c: f"{1e6 * c.timing.dense:.1f}")
    row("us per image, DEN", lambda c: f"{1e6 * c.timing.selected:.1f}")
    row("  of these, the selector", lambda c: f"{1e6 * c.timing.selector:.1f}")
    row("  times as fast", lambda c: f"{c.timing.speedup:.2f}")
    row("realised fraction", lambda c: f"{c.timing.realised:.2f}")
    row("structures in use", lambda c: f"{c.selected.structures}")
    row("  their entropy in nats", lambda c: f"{c.selected.variety:.2f}")
    row("  used most (levels, share)", lambda c: f"{digits(c.selected.common[0][0])} {_top_share(c):.0%}")
    row("entropy of the selector in nats", lambda c: f"{c.selected.entropy:.3f}")
    row("best single structure of that cost", lambda c: f"{c.best_static.accuracy:.2%}")
    row("  which, of how many", lambda c: f"{digits(c.best_static.levels[0])} of {len(c.affordable)}")
    row("  gain of choosing per image", lambda c: f"{100 * (c.selected.accuracy - c.best_static.accuracy):+.2f}")
    widths = [max(len(cells[k]) for _, cells in rows) for k in range(len(found))]
    lines = [
        f"{title:<36}" + "  ".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        for title, cells in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[1]), *lines[1:]])


NOTES = """\
FLOPs are twice the multiply-adds of the blocks.  Times are medians, batches of 256, taken in turns; dense
is the faster of plain convolutions (channels-last, batch norm folded) and our kernels at the full structure; DEN
includes its selector.  The realised fraction is the saving in time over the saving in FLOPs of the whole networks
(stems, heads and the selector counted on both sides of the account).  A structure is one level
per block: 0 skips it, the highest is all of it.  The best single structure is picked on these very test images."""


def digits(structure: Tensor) -> str:
    """A structure as its levels: `digits(torch.tensor([0, 3])) == "03"`."""
    return "".join(map(str, structure.tolist()))


def _top_share(c: Comparison) -> float:
    return c.selected.common[1][0].item() / c.selected.images


def remarks(found: Sequence[Comparison]) -> list[str]:
    """Sentences on the variety of structures, one a task and one on how the tasks differ."""
    lines = []
    for c in found:
        count, gain = c.selected.structures, 100 * (c.selected.accuracy - c.best_static.accuracy)
        if count == 1:
            only = digits(c.selected.common[0][0])
            lines.append(f"{c.task}: the selector COLLAPSED to one structure ({only}): every image runs alike.")
            continue
        verdict = (
            f"{gain:.2f} points better than the best of {len(c.affordable)} single structures that cost no more"
            if gain > 0
            else f"NO better than the best of {len(c.affordable)} single structures that cost no more ({gain:+.2f})"
        )
        lines.append(f"{c.task}: {count} structures in use; choosing per image is {verdict}.")
    if len(found) > 1:
        first, second = found[0].selected, found[1].selected
        block, gap = most_different_block(first.usage, second.usage)
        lines.append(
            f"Tasks differ most in block {block + 1}: {first.task} uses {first.usage[block]:.0%} of it,"
            f" {second.task} {second.usage[block]:.0%}."
            if gap > 0
            else "Both tasks use all blocks alike."
        )
    return lines


def most_different_block(first: Tensor, second: Tensor) -> tuple[int, float]:
    """The block of which two tasks use the least alike shares, each [N], and by how much they differ."""
    gaps = (first - second).abs()
    block = int(gaps.argmax())
    return block, gaps[block].item()


@dataclass(frozen=True)
class Check:
    """A claim, its measurement, and its verdict."""

    claim: str
    measured: str
    holds: bool | None  # None: not decided by what was measured


def checks(found: Sequence[Comparison], least_accuracy: dict[str, float]) -> list[Check]:
    """The claims of the demonstration, each with its measurement and its verdict, on this one training.

    A network below the least accuracy has learnt too little for any of them to hold.
    """
    lines = []
    for c in found:
        loss, gain = (
            100 * (c.dense.accuracy - c.selected.accuracy),
            100 * (c.selected.accuracy - c.best_static.accuracy),
        )
        least, accuracy, count = least_accuracy[c.task], c.selected.accuracy, c.selected.structures
        realised = c.timing.realised
        lines += [
            Check(f"{c.task}: {claim}", measured, accuracy >= least and holds)
            for claim, measured, holds in (
                (f"accuracy at least {least:.0%}", f"{accuracy:.2%}", True),
                ("within 1 point of dense", f"{-loss:+.2f}", loss <= 1 + 1e-9),
                ("at least 1.8 times fewer FLOPs", f"{c.saving:.2f}", c.saving >= 1.8),
                ("realised fraction at least 0.8", f"{realised:.2f}", realised >= 0.8),
                ("at least 10 structures (aim)", f"{count}", count >= 10),
                ("better than one structure for all (aim)", f"{gain:+.2f}", gain > 0),
            )
        ]
    if len(found) > 1:
        block, gap = most_different_block(found[0].selected.usage, found[1].selected.usage)
        learnt = all(c.selected.accuracy >= least_accuracy[c.task] for c in found)
        claim, measured = "levels differ between the tasks", f"by {gap:.0%} in block {block + 1}"
        lines.append(Check(claim, measured, learnt and gap >= 0.05))
    return lines


def check_lines(lines: Sequence[Check]) -> str:
    """The checks as text, one a line."""
    words = {True: "yes ", False: "NO  ", None: "open"}
    return "\n".join(f"  {words[c.holds]}  {c.claim}: {c.measured}" for c in lines)


def write_json(path: Path, found: Sequence[Comparison], extra: dict[str, Any]) -> None:
    """Write all numbers of a comparison as JSON."""
    tasks: dict[str, dict[str, Any]] = {
        c.task: {
            "dense": c.dense.summary(),
            "full": c.full.summary(),
            "selected": c.selected.summary(),
            "structures": [
                {"levels": digits(structure), "images": count}
                for structure, count in zip(c.selected.common[0], c.selected.common[1].tolist(), strict=True)
            ],
            "best_static": {"levels": digits(c.best_static.levels[0]), **c.best_static.summary()},
            "static": [{"levels": digits(s.levels[0]), "accuracy": s.accuracy, "flops": s.flops} for s in c.statics],
            "timing": {**asdict(c.timing), "speedup": c.timing.speedup, "realised": c.timing.realised},
        }
        for c in found
    }
    write_text(path, json.dumps({**extra, "tasks": tasks}, indent=2) + "\n")
