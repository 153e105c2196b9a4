"""Style shared by all figures: colours, fonts, and how levels, structures and images are drawn."""

import functools
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor
from torch.nn.functional import pad

INK, GREY, DEN, DENSE = "#222222", "#b5b8bd", "#d1495b", "#222222"
LEVELS = LinearSegmentedColormap.from_list("levels", ["#e9ecef", "#9ecae1", "#4292c6", "#08306b"])
STYLE: Any = {
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


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorator that draws a figure in `STYLE`, which must hold while it is built and while it is saved."""

    @functools.wraps(draw)
    def in_style(*arguments: Any, **options: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*arguments, **options)

    return in_style


def headline(figure: Figure, text: str) -> None:
    """Write the finding above all panels, in lines no longer than the figure is wide."""
    width = int(9.5 * figure.get_figwidth())
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, width)]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", weight="bold")


def save_all(drawings: dict[str, Figure], folder: Path) -> list[Path]:
    """Write figures as PNG under their names into `folder`; returns their paths."""
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, figure in drawings.items():
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1])
    return paths


def level_colour(level: int, levels: int) -> tuple[float, float, float, float]:
    """Colour of a level, darker for more channels."""
    return LEVELS(level / (levels - 1))


def level_name(level: int, levels: int, skips: bool) -> str:
    """The share of the hidden channels, in words; skips: level 0 is the shortcut alone."""
    if level == levels - 1:
        return "all"
    return "none: block skipped" if skips and level == 0 else f"1/{2 ** (levels - 1 - level)}"


def shared_legend(figure: Figure, axes: Axes) -> None:
    """A legend of what one panel holds, for all of them: below the figure, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, fontsize=9)


def level_legend(figure: Figure, levels: int, skips: bool) -> None:
    """A legend of the levels' colours below a figure; `skips`: level 0 leaves a block out."""
    handles = [Patch(color=level_colour(k, levels), label=level_name(k, levels, skips)) for k in range(levels)]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=levels, frameon=False, title="hidden channels used"
    )


def structure_cells(
    axes: Axes, structure: Tensor, levels: int, *, left: float, row: float, cell: float, height: float
) -> None:
    """Draw a structure [N] as coloured cells from `left` on, centred on `row`."""
    for i, level in enumerate(structure.tolist()):
        corner = (left + i * cell, row - height / 2)
        axes.add_patch(Rectangle(corner, 0.88 * cell, height, color=level_colour(level, levels), lw=0))


def image_strip(images: Tensor) -> np.ndarray:
    """Images uint8 [n, C, H, W] side by side with white gaps, grey ones dark on white: [H, n * (W + 2 gap), 3]."""
    ink = 255 - images if images.shape[1] == 1 else images
    gap = max(1, images.shape[-1] // 9)
    padded = pad(ink.expand(-1, 3, -1, -1), (gap, gap), value=255)
    return padded.permute(2, 0, 3, 1).flatten(1, 2).numpy()
