"""Figures of a comparison, each a PNG whose title says what was found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from den.count import count_flops
from den.levels import level_fractions
from den.model import DeepElasticNetwork
from den.report import Comparison, mean_width, most_different_block

INK, GREY, DEN, DENSE = "#222222", "#b5b8bd", "#d1495b", "#222222"
LEVELS = LinearSegmentedColormap.from_list("levels", ["#e9ecef", "#9ecae1", "#4292c6", "#08306b"])
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "text.color": INK,
    "figure.dpi": 130,
    "savefig.bbox": "tight",
}


def draw_all(found: Sequence[Comparison], model: DeepElasticNetwork, folder: Path) -> list[Path]:
    """Draw every figure into `folder`; returns their paths."""
    drawings = {
        "accuracy_flops": accuracy_against_flops(found),
        "levels": level_probabilities(found, model),
        "structures": structure_histogram(found, model),
        **{f"images_{c.task}": example_images(c, model) for c in found},
    }
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, figure in drawings.items():
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1])
    return paths


def _styled(draw):  # the style must hold while a figure is built and while it is saved
    def styled(*arguments):
        with matplotlib.rc_context(STYLE):
            return draw(*arguments)

    styled.__doc__, styled.__name__ = draw.__doc__, draw.__name__
    return styled


@_styled
def accuracy_against_flops(found: Sequence[Comparison]) -> Figure:
    """Accuracy against FLOPs: the choosing network, its static structures, the dense baseline."""
    figure = Figure(figsize=(5.6 * len(found), 4.4), layout="constrained")
    for axes, c in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        _accuracy_panel(axes, c)
    return figure


def _accuracy_panel(axes: Axes, c: Comparison) -> None:
    points = sorted((s.flops / 1e6, 100 * s.accuracy) for s in (*c.statics, c.full))
    best = [max(accuracy for flops, accuracy in points if flops <= limit) for limit, _ in points]
    axes.step([flops for flops, _ in points], best, where="post", color=GREY, lw=1.5)
    axes.scatter(*zip(*points, strict=True), s=14, color=GREY, label="one structure for all images (line: the best)")
    dense = (c.dense.flops / 1e6, 100 * c.dense.accuracy)
    chosen = (c.selected.flops / 1e6, 100 * c.selected.accuracy)
    axes.scatter(*dense, s=70, marker="s", color=DENSE, zorder=3, label="dense baseline, trained alone")
    axes.scatter(*chosen, s=170, marker="*", color=DEN, zorder=4, label="Deep Elastic Network, a structure per image")
    axes.annotate(
        f"{chosen[1]:.1f} %", chosen, xytext=(-6, 8), textcoords="offset points", ha="right", color=DEN, weight="bold"
    )
    axes.annotate(f"{dense[1]:.1f} %", dense, xytext=(-2, 10), textcoords="offset points", ha="right")
    top = max(dense[1], chosen[1], *(accuracy for _, accuracy in points))
    low = min(max(min(accuracy for _, accuracy in points), top - 12), chosen[1] - 1)
    axes.set_ylim(low - 0.5, top + 0.12 * (top - low) + 0.3)
    axes.set_xlim(0, 1.04 * dense[0])
    axes.set(xlabel="MFLOP per image (mean)", ylabel="test accuracy in %")
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    hidden = sum(accuracy < low - 0.5 for _, accuracy in points)
    if hidden:
        axes.text(0.02, 0.02, f"{hidden} worse ones lie below", transform=axes.transAxes, color="#888888", fontsize=9)
    difference = chosen[1] - dense[1]
    words = f"{abs(difference):.1f} points {'above' if difference >= 0 else 'below'} dense"
    axes.set_title(f"{c.task}: {c.saving:.1f} times fewer FLOPs, {words}")
    axes.legend(loc="lower right", frameon=False, fontsize=9)


@_styled
def level_probabilities(found: Sequence[Comparison], model: DeepElasticNetwork) -> Figure:
    """Mean probability of each level, block by block and task by task."""
    figure = Figure(figsize=(5.2 * len(found), 4.2), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, c in zip(panels, found, strict=True):
        _level_bars(axes, c, model)
    panels[0].set_ylabel("mean probability of each level")
    count = model.levels
    handles = [Patch(color=_level_colour(level, count), label=_level_name(level, count)) for level in range(count)]
    figure.legend(handles=handles, loc="outside lower center", ncols=count, frameon=False, title="hidden channels used")
    title = "How the selector spends on each block"
    if len(found) > 1:
        block, gap = most_different_block(found[0], found[1])
        first, second = (f"{mean_width(c, block):.0%} of block {block + 1}" for c in found[:2])
        title = f"{found[0].task} images use {first}, {found[1].task} images {second}"
        title = title if gap >= 0.05 else "The tasks use the blocks alike"
    figure.suptitle(title, x=0.02, ha="left", weight="bold")
    return figure


def _level_bars(axes: Axes, c: Comparison, model: DeepElasticNetwork) -> None:
    positions, floor = range(model.num_blocks), [0.0] * model.num_blocks
    for level, heights in enumerate(c.selected.probabilities.t().tolist()):
        axes.bar(positions, heights, bottom=floor, width=0.8, color=_level_colour(level, model.levels))
        for i in positions:
            if heights[i] >= 0.12:
                colour = "white" if level >= model.levels / 2 else INK
                middle = floor[i] + heights[i] / 2
                axes.text(i, middle, f"{heights[i]:.0%}", ha="center", va="center", size=9, color=colour)
        floor = [below + height for below, height in zip(floor, heights, strict=True)]
    labels = [f"{i + 1}\n{s.channels} ch\n{s.size}x{s.size}" for i, s in enumerate(model.config.shapes)]
    axes.set_xticks(positions, labels)
    axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    axes.tick_params(length=0)
    axes.set(xlabel="block", title=f"{c.task}: {c.selected.flops_ratio:.0%} of the FLOPs")


def _level_colour(level: int, levels: int) -> tuple[float, ...]:
    return LEVELS(level / (levels - 1))


def _level_name(level: int, levels: int) -> str:
    fraction = level_fractions(levels)[level]
    names = {0: "none: block skipped", 1: "all"}
    return names.get(fraction, f"1/{round(1 / max(fraction, 1e-9))}")


@_styled
def structure_histogram(found: Sequence[Comparison], model: DeepElasticNetwork) -> Figure:
    """The structures used most, drawn as levels, with the share of images that each gets."""
    rows = max(min(15, c.selected.structures) for c in found)
    figure = Figure(figsize=(5.6 * len(found), 1.7 + 0.3 * rows), layout="constrained")
    for axes, c in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        _histogram_panel(axes, c, model, rows)
    handles = [
        Patch(color=_level_colour(level, model.levels), label=_level_name(level, model.levels))
        for level in range(model.levels)
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=model.levels, frameon=False, title="hidden channels used"
    )
    return figure


def _histogram_panel(axes: Axes, c: Comparison, model: DeepElasticNetwork, rows: int) -> None:
    structures, counts = c.selected.common
    shares = (100 * counts.double() / c.selected.images).tolist()
    shown = min(rows, len(structures))
    costs = (count_flops(model, structures) / 1e6).tolist()
    longest = shares[0]
    axes.barh(range(shown), shares[:shown], color=DEN, height=0.7)
    cell = 0.07 * longest
    for row in range(shown):
        left = -cell * (model.num_blocks + 1)
        _structure_cells(axes, structures[row], model.levels, left=left, row=row, cell=cell, height=0.72)
        axes.text(
            shares[row] + 0.02 * longest, row, f"{shares[row]:.1f} %, {costs[row]:.0f} MFLOP", va="center", size=9
        )
    axes.set_xlim(-cell * (model.num_blocks + 1.5), 1.45 * longest)
    axes.set_ylim(rows - 0.4, -1.3)
    axes.text(-cell * (model.num_blocks + 1), -0.75, f"blocks 1 to {model.num_blocks}", size=9, color="#666666")
    axes.text(0, -0.75, "share of test images, cost", size=9, color="#666666")
    axes.set_axis_off()
    finding = f"{len(structures)} structures in use, the first for {shares[0]:.0f} % of the images"
    axes.set_title(f"{c.task}: {finding if len(structures) > 1 else 'one structure in use'}")


def _structure_cells(
    axes: Axes, structure: Tensor, levels: int, *, left: float, row: float, cell: float, height: float
) -> None:
    """A structure as coloured cells from `left` on, centred on `row`."""
    for i, level in enumerate(structure.tolist()):
        corner = (left + i * cell, row - height / 2)
        axes.add_patch(Rectangle(corner, 0.88 * cell, height, color=_level_colour(level, levels), lw=0))


@_styled
def example_images(c: Comparison, model: DeepElasticNetwork) -> Figure:
    """Test images of the most chosen structures, and the cheapest and most expensive ones."""
    columns = 12
    rows = _example_rows(c, model, columns)
    figure = Figure(figsize=(11.8, 0.74 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots()
    for row, (words, structure, index) in enumerate(rows):
        axes.text(-4.6, row, words, va="center", size=9, linespacing=1.5)
        if structure is not None:
            cell = 1.2 / len(structure)
            _structure_cells(axes, structure, model.levels, left=-1.85, row=row, cell=cell, height=0.4)
        strip, extent = _strip(c.images.images[index]), (-0.5, len(index) - 0.5, row + 0.45, row - 0.45)
        axes.imshow(strip, cmap="gray", vmin=0, vmax=255, extent=extent, aspect="auto")
    axes.set(xlim=(-4.6, columns - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_axis_off()
    figure.suptitle(_class_costs(c, model), x=0.01, ha="left", weight="bold")
    return figure


def _strip(images: Tensor) -> np.ndarray:
    """Images uint8 [n, 1, H, W], dark on white, side by side with gaps: [H, n * (W + 2 gap)]."""
    gap = max(1, images.shape[-1] // 9)
    padded = torch.nn.functional.pad(images[:, 0], (gap, gap))
    return (255 - padded.permute(1, 0, 2).flatten(1)).numpy()


def _example_rows(c: Comparison, model: DeepElasticNetwork, columns: int) -> list[tuple[str, Tensor | None, Tensor]]:
    """Rows of a figure: words, the structure if there is one, positions of images."""
    levels = c.selected.levels
    costs = count_flops(model, levels) / 1e6
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(len(levels), generator=generator)
    by_cost = shuffled[costs[shuffled].argsort(stable=True)]
    rows: list[tuple[str, Tensor | None, Tensor]] = []
    if len(c.selected.common[0]) > 1:
        cheap, dear = by_cost[:columns], by_cost[-columns:].flip(0)
        rows.append((f"cheapest images\n{costs[cheap].mean():.1f} MFLOP", None, cheap))
        rows.append((f"most expensive\n{costs[dear].mean():.1f} MFLOP", None, dear))
    for structure in c.selected.common[0][:5]:
        members = shuffled[(levels[shuffled] == structure).all(1)]
        share = 100 * len(members) / len(levels)
        words = f"{share:.1f} % of images, {costs[members[0]]:.0f} MFLOP\n{_leading_classes(c, members)}"
        rows.append((words, structure, members[:columns]))
    return rows


def _leading_classes(c: Comparison, members: Tensor) -> str:
    counts = c.images.labels[members].bincount(minlength=c.images.classes)
    names = c.images.class_names or tuple(map(str, range(c.images.classes)))
    leading = [names[k] for k in counts.argsort(descending=True, stable=True)[:2].tolist() if counts[k]]
    return "most often " + ", ".join(leading)


def _class_costs(c: Comparison, model: DeepElasticNetwork) -> str:
    """Which classes cost least and most, in words."""
    costs = count_flops(model, c.selected.levels) / 1e6
    names = c.images.class_names or tuple(map(str, range(c.images.classes)))
    present = c.images.labels.unique().tolist()
    means = {names[k]: costs[c.images.labels == k].mean().item() for k in present}
    cheap, dear = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    if means[dear] - means[cheap] < 0.01:
        return f"{c.task}: every class costs {means[cheap]:.1f} MFLOP per image"
    return f"{c.task}: {cheap} costs least ({means[cheap]:.1f} MFLOP per image), {dear} most ({means[dear]:.1f})"
