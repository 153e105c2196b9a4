"""Figures of the comparison of a Deep Elastic Network with its dense baseline."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from den.evaluate.comparison import Comparison
from den.nn.model import DeepElasticNetwork
from den.report.figures.selection import example_images, level_probabilities, structure_histogram
from den.report.figures.style import DEN, DENSE, GREY, save_all, shared_legend, styled


def draw_all(found: Sequence[Comparison], model: DeepElasticNetwork, folder: Path) -> list[Path]:
    """Draw every figure into `folder`; returns their paths."""
    selected = [c.selected for c in found]
    drawings = {
        "accuracy_flops": accuracy_against_flops(found),
        "levels": level_probabilities(selected, model),
        "structures": structure_histogram(selected, model),
        **{f"images_{c.task}": example_images(c.selected, c.images, model) for c in found},
    }
    return save_all(drawings, folder)


@styled
def accuracy_against_flops(found: Sequence[Comparison]) -> Figure:
    """Accuracy against FLOPs: the choosing network, its static structures, the dense baseline."""
    figure = Figure(figsize=(max(7.0, 5.6 * len(found)), 4.7), layout="constrained")
    for axes, c in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        _accuracy_panel(axes, c)
    shared_legend(figure, figure.axes[0])
    return figure


def _accuracy_panel(axes: Axes, c: Comparison) -> None:
    points = sorted((s.flops / 1e6, 100 * s.accuracy) for s in (*c.statics, c.full))
    best = [max(accuracy for flops, accuracy in points if flops <= limit) for limit, _ in points]
    axes.step([flops for flops, _ in points], best, where="post", color=GREY, lw=1.5)
    flops, accuracy = zip(*points, strict=True)
    axes.scatter(
        flops,
        accuracy,
        s=14,
        color=GREY,
        label="one structure for all images (line: the best)",
    )
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
