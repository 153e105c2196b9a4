#!/usr/bin/env python3
"""Tells what choosing per image is worth on held-out images: for settings to be compared without the test images.

    scripts/choices.py RUN... --dense RUN [--flops 0.5] [--singles 60] [--data-root data]

Each network is steered to the same share of the full structure's FLOPs (`den evaluate --budget-flops`).  The single
structure that it is held against costs no more than 3 % more and is the best on one half of the held-out images, the
gain is measured on the other half: the mean over halvings, drawn at random.  Prints a table in Markdown.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from den.data import ImageSet
from den.evaluate.accuracy import BATCH, evaluate, full_flops, static_candidates
from den.evaluate.operating import at_flops
from den.nn.model import DeepElasticNetwork
from den.runs.gain import MOST_USED, cost_correlation, image_losses
from den.runs.steering import unseen_images
from den.runs.trained import open_run
from den.support.tables import markdown_table

HALVINGS = 50
HEAD = (
    "run", "full structure %", "chosen %", "FLOPs", "structures", "best single %", "gain", "given by chance",
    "correlation",
)  # fmt: skip
NOTES = """\
Held-out images.  full structure: accuracy of all images at it; chosen: at the structures that the selector chooses,
steered to that share of the FLOPs; best single: the single structure for all images, chosen on other images than it is
measured on; gain: of choosing over it, in points; given by chance: of choosing over the same structures shuffled among
the images; correlation: rank correlation of an image's FLOPs with the dense network's loss."""


@dataclass(frozen=True)
class Choices:
    """Results of a task of a run; accuracies 0..1."""

    full: float
    chosen: float
    flops: float
    structures: int
    single: float
    shuffled: float
    correlation: float | None

    def cells(self, name: str) -> list[str]:
        """A row of the table."""
        correlation = "" if self.correlation is None else f"{self.correlation:+.2f}"
        return [
            name, f"{100 * self.full:.2f}", f"{100 * self.chosen:.2f}", f"{self.flops:.2f}", f"{self.structures}",
            f"{100 * self.single:.2f}", f"{100 * (self.chosen - self.single):+.2f}",
            f"{100 * (self.chosen - self.shuffled):+.2f}", correlation,
        ]  # fmt: skip


def right(model: DeepElasticNetwork, images: ImageSet, structures: Tensor) -> Tensor:
    """1 for each image that is classified right, else 0: float32 [n]; structures int64 [n, N], or [N] for all."""
    parts = structures.expand(len(images), -1).split(BATCH)
    found = []
    with torch.inference_mode():
        for k, part in enumerate(parts):
            rows = slice(k * BATCH, k * BATCH + len(part))
            logits = model.estimator(images.inputs(rows), images.name, part.contiguous())
            found.append(logits.argmax(1) == images.labels[rows])
    return torch.cat(found).float()


def halved(singles: Tensor, generator: torch.Generator) -> float:
    """Accuracy of the best of some structures, chosen on one half of the images and measured on the other.

    singles: [S, n], 1 where an image is right at a structure; S at least 1. The mean over `HALVINGS` halvings.
    """
    count, total = singles.shape[1], 0.0
    for _ in range(HALVINGS):
        order = torch.randperm(count, generator=generator)
        chosen_on, measured_on = order[: count // 2], order[count // 2 :]
        best = singles[:, chosen_on].mean(1).argmax()
        total += singles[best, measured_on].mean().item()
    return total / HALVINGS


def measure(model: DeepElasticNetwork, images: ImageSet, losses: Tensor, flops: float | None, tried: int) -> Choices:
    """Measure a network on held-out images. losses: [n], of the dense network on them."""
    generator = torch.Generator().manual_seed(0)
    point = at_flops(model, [images], flops)[0] if flops else model
    report = evaluate(point, [images])[images.name]
    cost = report.flops
    few = report.common[0][:MOST_USED]
    few = few[model.estimator.level_flops.double().gather(1, few.t()).sum(0) <= 1.03 * cost]
    candidates = torch.cat([static_candidates(model, cost, tried, 0.03, 0), few]).unique(dim=0)
    singles = torch.stack([right(model, images, structure) for structure in candidates])
    order = torch.randperm(len(images), generator=generator)
    return Choices(
        full=evaluate(model, [images], "full")[images.name].accuracy,
        chosen=report.accuracy,
        flops=cost / full_flops(model),
        structures=report.structures,
        single=halved(singles, generator),
        shuffled=right(model, images, report.levels[order]).mean().item(),
        correlation=cost_correlation(model, report.levels, losses),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--flops", type=float, default=None)
    parser.add_argument("--singles", type=int, default=60)
    parser.add_argument("--data-root", type=Path, default=None)
    options = parser.parse_args()
    dense, rows = open_run(options.dense).model, []
    for folder in options.runs:
        run = open_run(folder)
        for images in unseen_images(run, options.data_root)[1]:
            found = measure(run.model, images, image_losses(dense, images), options.flops, options.singles)
            rows.append(found.cells(folder.name if len(run.model.tasks) == 1 else f"{folder.name}, {images.name}"))
            print(rows[-1], flush=True)
    print(f"\n{markdown_table(HEAD, rows)}\n\n{NOTES}")


if __name__ == "__main__":
    main()
