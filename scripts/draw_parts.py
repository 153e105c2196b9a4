"""Boxes in rows and arrows between them, for scripts/architecture.py."""

import itertools
import textwrap
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Line

Edge = tuple[str, str]
Place = tuple[float, float, float]  # x and y of the middle, width
WIDTH, BOX, GAP, LANE = 10.0, 0.72, 0.42, 0.5  # inches: of the rows, height of a box, between rows, of a passing arrow
MARGIN = 0.15  # inches: between two arrows against the order, which run beside the rows
COLOURS = {"den": "#e8eef7", "den_kernels": "#fdeedd", "csrc": "#f7e3e3"}
INK, AGAINST = "#33415c", "#c1121f"


def lanes(row: dict[str, int], edges: list[Edge]) -> tuple[dict[str, int], dict[Edge, list[str]]]:
    """The rows with a place for every arrow in each row that it passes, and the places of each arrow in order."""
    places, paths = dict(row), {}
    for above, below in edges:
        passed = [f"{above}>{below}@{k}" for k in range(row[above] - 1, row[below], -1)]
        places |= {name: row[above] - 1 - k for k, name in enumerate(passed)}
        paths[above, below] = [above, *passed, below]
    return places, paths


def arranged(places: dict[str, int], paths: dict[Edge, list[str]], boxes: dict[str, int]) -> dict[str, Place]:
    """Every place in the picture; those in a row are sorted by the mean of the places that lead to them."""
    above = defaultdict(list)
    for path in paths.values():
        for upper, lower in itertools.pairwise(path):
            above[lower].append(upper)
    found: dict[str, Place] = {}
    for level in sorted(set(places.values()), reverse=True):
        own = [name for name, row in places.items() if row == level]
        mean = {name: sum(found[u][0] for u in above[name]) / max(1, len(above[name])) for name in own}
        own.sort(key=lambda name: (mean[name], name in boxes, name))
        passing = sum(name not in boxes for name in own)
        width = (WIDTH - 0.4 - LANE * passing) / max(1, len(own) - passing)
        x = 0.2
        for name in own:
            room = width if name in boxes else LANE
            found[name] = (x + room / 2, level * (BOX + GAP) + BOX / 2 + 0.2, room - 0.2)
            x += room
    return found


def draw_box(axes: Axes, place: Place, colour: str, words: tuple[str, str, str]) -> None:
    """A box with the name of a part, its size, and what it holds."""
    x, y, width = place
    corner = (x - width / 2, y - BOX / 2)
    axes.add_patch(FancyBboxPatch(corner, width, BOX, "round,pad=0,rounding_size=0.06", fc=colour, ec=INK, lw=1))
    name, holds, size = words
    left, top = corner[0] + 0.1, y + BOX / 2 - 0.08
    axes.text(left, top, name, ha="left", va="top", fontsize=10, weight="bold", color=INK, family="monospace")
    axes.text(x + width / 2 - 0.1, top, size, ha="right", va="top", fontsize=7.5, color=INK)
    lines = textwrap.wrap(holds, max(20, int(width * 15.5)))
    text = "\n".join(lines[:2] if len(lines) < 3 else [lines[0], f"{lines[1].rsplit(' ', 1)[0]} …"])
    axes.text(left, top - 0.26, text, ha="left", va="top", fontsize=8.5, color="black", linespacing=1.15)


def draw_arrow(axes: Axes, points: list[tuple[float, float]], colour: str) -> None:
    """An arrow through points, upright where it passes a row."""
    vertices, codes = [points[0]], [Line.MOVETO]
    for start, end in itertools.pairwise(points):
        middle = (start[1] + end[1]) / 2
        vertices += [(start[0], middle), (end[0], middle), end]
        codes += [Line.CURVE4] * 3
    axes.add_patch(
        FancyArrowPatch(path=Line(vertices, codes), arrowstyle="-|>", mutation_scale=11, color=colour, lw=1.1)
    )


def draw_beside(axes: Axes, start: Place, end: Place, x: float, k: int) -> None:
    """An arrow from the foot of a box to that of another, in the gaps below them and along the margin at x."""
    feet = [(place[0] + place[2] / 2 - 0.2 - 0.12 * k, place[1] - BOX / 2) for place in (start, end)]
    low = [y - 0.08 - 0.04 * k for _, y in feet]
    points = [feet[0], (feet[0][0], low[0]), (x, low[0]), (x, low[1]), (feet[1][0], low[1]), feet[1]]
    line = Line(points, [Line.MOVETO, *[Line.LINETO] * 5])
    axes.add_patch(FancyArrowPatch(path=line, arrowstyle="-|>", mutation_scale=8, color=AGAINST, lw=1.1))


def line_through(path: list[str], place: dict[str, Place], spread: float) -> list[tuple[float, float]]:
    """The points of an arrow: out of a box below, down its lanes, into a box from above."""
    start, *passed, end = (place[name] for name in path)
    points = [(start[0] + spread * start[2], start[1] - BOX / 2)]
    for x, y, _ in passed:
        points += [(x, y + BOX / 2), (x, y - BOX / 2)]
    x = min(max(points[-1][0], end[0] - 0.4 * end[2]), end[0] + 0.4 * end[2])
    return [*points, (x, end[1] + BOX / 2)]


def draw(
    row: dict[str, int], edges: list[Edge], against: list[Edge], words: dict[str, tuple[str, str, str]], target: Path
) -> None:
    """Write the picture: parts in rows, an arrow for each import that follows from no other, red ones upwards."""
    places, paths = lanes(row, edges)
    place = arranged(places, paths, row)
    height = (max(row.values()) + 1) * (BOX + GAP) - GAP + 0.4
    width = WIDTH + MARGIN * len(against)
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    for part in row:
        draw_box(axes, place[part], COLOURS[part.split(".")[0]], words[part])
    leaving = defaultdict(list)
    for above, below in sorted(paths, key=lambda edge: place[paths[edge][1]][0]):
        leaving[above].append(below)
    for above, targets in leaving.items():
        for k, below in enumerate(targets):
            spread = 0.6 * ((k + 0.5) / len(targets) - 0.5)
            draw_arrow(axes, line_through(paths[above, below], place, spread), INK)
    for k, (above, below) in enumerate(against):
        draw_beside(axes, place[above], place[below], WIDTH + MARGIN * k, k)
    figure.savefig(target, dpi=130, facecolor="white")
    plt.close(figure)
