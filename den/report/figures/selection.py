"""Figures of what a selector chose: the levels of the blocks, the structures, and the images that got them (figures 6
and 7 of the paper, and more)."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from den.data import ImageSet
from den.evaluate.accuracy import TaskReport
from den.evaluate.comparison import most_different_block
from den.nn.count import count_flops
from den.nn.model import DeepElasticNetwork
from den.report.figures.style import (
    DEN,
    INK,
    headline,
    image_strip,
    level_colour,
    level_legend,
    structure_cells,
    styled,
)
from den.train.objective import parameter_fractions


def _legend(figure: Figure, model: DeepElasticNetwork) -> None:
    level_legend(figure, model.levels, not model.estimator.level_parameters[:, 0].any())


@styled
def level_probabilities(found: Sequence[TaskReport], model: DeepElasticNetwork) -> Figure:
    """Mean probability of each level, block by block and task by task."""
    figure = Figure(figsize=(max(5.2, 0.45 * model.num_blocks + 1.5) * len(found), 4.2), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, c in zip(panels, found, strict=True):
        _level_bars(axes, c, model)
    panels[0].set_ylabel("mean probability of each level")
    _legend(figure, model)
    title = "How the selector spends on each block"
    if len(found) > 1:
        shares = parameter_fractions(model).cpu()
        given = [(c.probabilities * shares).sum(1) for c in found[:2]]  # of each block's weights
        block, gap = most_different_block(*given)
        first, second = (f"{of_blocks[block]:.0%} of block {block + 1}" for of_blocks in given)
        title = f"{found[0].task} images are given {first}, {found[1].task} images {second}"
        title = title if gap >= 0.05 else "The tasks are given the blocks alike"
    headline(figure, title)
    return figure


def _level_bars(axes: Axes, c: TaskReport, model: DeepElasticNetwork) -> None:
    positions, floor = range(model.num_blocks), [0.0] * model.num_blocks
    for level, heights in enumerate(c.probabilities.t().tolist()):
        axes.bar(positions, heights, bottom=floor, width=0.8, color=level_colour(level, model.levels))
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
    axes.set(xlabel="block", title=f"{c.task}: {c.flops_ratio:.0%} of the FLOPs")


@styled
def structure_histogram(found: Sequence[TaskReport], model: DeepElasticNetwork) -> Figure:
    """The structures used most, drawn as levels, with the share of images that each gets."""
    rows = max(min(15, c.structures) for c in found)
    figure = Figure(figsize=(5.6 * len(found), 1.7 + 0.3 * rows), layout="constrained")
    for axes, c in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        _histogram_panel(axes, c, model, rows)
    _legend(figure, model)
    return figure


def _histogram_panel(axes: Axes, c: TaskReport, model: DeepElasticNetwork, rows: int) -> None:
    structures, counts = c.common
    shares = (100 * counts.double() / c.images).tolist()
    shown = min(rows, len(structures))
    costs = (count_flops(model, structures) / 1e6).tolist()
    longest = shares[0]
    axes.barh(range(shown), shares[:shown], color=DEN, height=0.7)
    cell = 0.07 * longest
    for row in range(shown):
        left = -cell * (model.num_blocks + 1)
        structure_cells(axes, structures[row], model.levels, left=left, row=row, cell=cell, height=0.72)
        axes.text(
            shares[row] + 0.02 * longest, row, f"{shares[row]:.1f} %, {costs[row]:.0f} MFLOP", va="center", size=9
        )
    axes.set_xlim(-cell * (model.num_blocks + 1.5), 1.45 * longest)
    axes.set_ylim(rows - 0.4, -1.3)
    axes.text(-cell * (model.num_blocks + 1), -0.75, f"blocks 1 to {model.num_blocks}", size=9, color="#666666")
    axes.text(0, -0.75, "share of test images, cost", size=9, color="#666666")
    axes.set_axis_off()
    finding = f"{len(structures)} structures, the first for {shares[0]:.0f} % of the images"
    axes.set_title(f"{c.task}: {finding if len(structures) > 1 else 'one structure in use'}")


@styled
def example_images(c: TaskReport, image_set: ImageSet, model: DeepElasticNetwork) -> Figure:
    """Test images of the most chosen structures, and the cheapest and most expensive ones."""
    columns = 12
    rows = _example_rows(c, image_set, model, columns)
    figure = Figure(figsize=(11.8, 0.74 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots()
    for row, (words, structure, index) in enumerate(rows):
        axes.text(-4.6, row, words, va="center", size=9, linespacing=1.5)
        if structure is not None:
            cell = 1.2 / len(structure)
            structure_cells(axes, structure, model.levels, left=-1.85, row=row, cell=cell, height=0.4)
        strip, extent = image_strip(image_set.images[index]), (-0.5, len(index) - 0.5, row + 0.45, row - 0.45)
        axes.imshow(strip, extent=extent, aspect="auto")
    axes.set(xlim=(-4.6, columns - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_axis_off()
    headline(figure, _class_costs(c, image_set, model))
    return figure


def _example_rows(
    c: TaskReport, image_set: ImageSet, model: DeepElasticNetwork, columns: int
) -> list[tuple[str, Tensor | None, Tensor]]:
    """Rows of a figure: words, the structure if there is one, positions of images."""
    levels = c.levels
    costs = count_flops(model, levels) / 1e6
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(len(levels), generator=generator)
    by_cost = shuffled[costs[shuffled].argsort(stable=True)]
    rows: list[tuple[str, Tensor | None, Tensor]] = []
    if len(c.common[0]) > 1:
        cheap, dear = by_cost[:columns], by_cost[-columns:].flip(0)
        rows.append((f"cheapest images\n{costs[cheap].mean():.1f} MFLOP", None, cheap))
        rows.append((f"most expensive\n{costs[dear].mean():.1f} MFLOP", None, dear))
    for structure in c.common[0][:5]:
        members = shuffled[(levels[shuffled] == structure).all(1)]
        share = 100 * len(members) / len(levels)
        words = f"{share:.1f} % of images, {costs[members[0]]:.0f} MFLOP\n{_leading_classes(image_set, members)}"
        rows.append((words, structure, members[:columns]))
    return rows


def _leading_classes(image_set: ImageSet, members: Tensor) -> str:  # members: int64 [n]
    counts = image_set.labels[members].bincount(minlength=image_set.classes)
    names = image_set.class_names or tuple(map(str, range(image_set.classes)))
    leading = [names[k] for k in counts.argsort(descending=True, stable=True)[:2].tolist() if counts[k]]
    return "most often " + ", ".join(leading)


def _class_costs(c: TaskReport, image_set: ImageSet, model: DeepElasticNetwork) -> str:
    """Sentence on the classes that cost least and most."""
    costs = count_flops(model, c.levels) / 1e6
    names = image_set.class_names or tuple(map(str, range(image_set.classes)))
    present = image_set.labels.unique().tolist()
    means = {names[k]: costs[image_set.labels == k].mean().item() for k in present}
    cheap, dear = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    if means[dear] - means[cheap] < 0.01:
        return f"{c.task}: every class costs {means[cheap]:.1f} MFLOP per image"
    return f"{c.task}: {cheap} costs least ({means[cheap]:.1f} MFLOP per image), {dear} most ({means[dear]:.1f})"


@styled
def favourites(found: Sequence[TaskReport], sets: Sequence[ImageSet], model: DeepElasticNetwork) -> Figure:
    """The structure that each data set selects most, and images that selected it (figure 7 of the paper)."""
    columns = 10
    figure = Figure(figsize=(11.8, 1.25 * len(found) + 0.9), layout="constrained")
    panels = figure.subplots(len(found), 2, squeeze=False, width_ratios=[1, 2.2])
    for (left, right), c, image_set in zip(panels, found, sets, strict=True):
        structure, count = c.common[0][0], int(c.common[1][0])
        structure_cells(left, structure, model.levels, left=0, row=0, cell=1, height=0.9)
        left.set(xlim=(0, len(structure)), ylim=(-0.6, 0.6))
        cost = count_flops(model, structure[None]).item() / 1e6
        left.set_title(f"{c.task}: {count / c.images:.1%} of its images, {cost:.1f} MFLOP", fontsize=10)
        members = (c.levels == structure).all(1).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=torch.Generator().manual_seed(0))[:columns]]
        extent = (0, len(members), -9 / 22, 9 / 22)  # square images, with the gaps of `image_strip` at their sides
        right.imshow(image_strip(image_set.images[members]), extent=extent, aspect="equal")
        right.set(xlim=(0, columns), anchor="W")
        right.set_title(_leading_classes(image_set, (c.levels == structure).all(1)), fontsize=10)
        left.set_axis_off()
        right.set_axis_off()
    _legend(figure, model)
    different = len({tuple(c.common[0][0].tolist()) for c in found})
    words = (
        f"{len(found)} data sets select {different} different structures most" if len(found) > 1 else "Selected most"
    )
    headline(figure, words)
    return figure
