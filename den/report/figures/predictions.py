"""A picture with what a network says of it, and what it spent on it."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from den.report.figures.style import DEN, GREY, headline, level_colour, level_legend, styled
from den.runs.predict import Classifier, Prediction


@styled
def prediction_figure(picture: Image.Image, found: Sequence[Prediction], network: Classifier) -> Figure:
    """The picture as the network saw it, the likeliest classes and the structure of every task."""
    figure = Figure(figsize=(11.0, max(3.4, 2.9 * len(found) + 0.6)), layout="constrained")
    panels = figure.subplots(len(found), 3, squeeze=False, width_ratios=(1, 1.1, 1.6))
    for row, prediction in zip(panels, found, strict=True):
        row[0].imshow(picture, interpolation="nearest")
        row[0].set_axis_off()
        _classes(row[1], prediction)
        _structure(row[2], prediction, network)
    level_legend(figure, network.level_flops.shape[1], network.skips)
    headline(figure, "\n".join(_finding(prediction, network) for prediction in found))
    return figure


def _finding(found: Prediction, network: Classifier) -> str:
    task = f"{found.task}: " if len(network.tasks) > 1 else ""
    cost = f"{found.flops / 1e6:.1f} MFLOP, {found.flops_ratio:.0%} of the full structure"
    return f"{task}{found.label} ({found.confidence:.0%}), {cost}"


def _classes(axes: Axes, found: Prediction) -> None:
    names, chances = zip(*reversed(found.top), strict=True)
    axes.barh(range(len(names)), chances, color=[GREY] * (len(names) - 1) + [DEN], height=0.65)
    axes.set_yticks(range(len(names)), [name if len(name) < 24 else f"{name[:22]}…" for name in names])
    for k, chance in enumerate(chances):
        axes.text(chance + 0.02, k, f"{chance:.0%}", va="center", size=9)
    axes.set(xlim=(0, 1.15), xticks=(0, 0.5, 1), xlabel="probability")


def _structure(axes: Axes, found: Prediction, network: Classifier) -> None:
    """Draw a column for each block: as high as all of it, filled as far as it was used."""
    table = network.level_flops
    used = table.gather(1, torch.tensor(found.levels)[:, None]).squeeze(1) / table[:, -1]
    blocks = range(len(found.levels))
    axes.bar(blocks, [1.0] * len(used), width=0.8, color="none", edgecolor=GREY, lw=0.8)
    axes.bar(blocks, used.tolist(), width=0.8, color=[level_colour(level, table.shape[1]) for level in found.levels])
    axes.set_xticks(blocks, [str(k + 1) for k in blocks])
    axes.set(xlabel="block", ylabel="share of the block", ylim=(0, 1.05))
