"""The shared graph as a picture, each task's sub-graph in its colour."""

from itertools import accumulate
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch

from den.dag.graph import Graph, SubGraph
from den.recipes.dag.recipe import Network

INK, FAINT, PAPER = "#222222", "#dddddd", "white"


def draw_graph(model: Network, path: Path) -> None:
    """Draw what all tasks share and what each keeps, to a PNG."""
    structures = {task.name: model.structure(k) for k, task in enumerate(model.tasks)}
    graph_figure(model.graph, structures).savefig(path, dpi=110, bbox_inches="tight")


def graph_figure(graph: Graph, structures: dict[str, SubGraph]) -> Figure:
    """A panel for the shared graph, in which the number of tasks that keep an edge is its width, and one per task.

    What a task dropped is faint; dotted lines part the stages.  An arrow from below is a read-in, one that leaves
    upwards a read-out.
    """
    columns = 4 if len(structures) > 4 else max(1, len(structures))
    rows = -(-len(structures) // columns)
    with matplotlib.rc_context({"font.size": 10, "text.color": INK}):
        figure = Figure(figsize=(4.4 * columns, 2.6 + 2.1 * rows), layout="constrained")
        grid = figure.add_gridspec(rows + 1, columns, height_ratios=[1.5] + [1] * rows)
        _shared_panel(figure.add_subplot(grid[0, :]), graph, list(structures.values()))
        for k, (name, kept) in enumerate(structures.items()):
            axes = figure.add_subplot(grid[1 + k // columns, k % columns])
            _task_panel(axes, kept, task_colour(k), name)
    return figure


def task_colour(index: int) -> str:
    """A colour per task, dark enough for white text; twenty differ."""
    hue = matplotlib.color_sequences["tab20"][(2 * index) % 20 + (index // 10) % 2]
    red, green, blue = matplotlib.colors.to_rgb(hue)
    return matplotlib.colors.to_hex((0.82 * red, 0.82 * green, 0.82 * blue))


def _shared_panel(axes: Axes, graph: Graph, kept: list[SubGraph]) -> None:
    counts = [sum(sub.edges[e] for sub in kept) for e in range(len(graph.edges))]
    for e, (i, j) in enumerate(graph.edges):
        share = counts[e] / len(kept)
        colour = matplotlib.colors.to_hex((1 - 0.15 - 0.75 * share,) * 3) if counts[e] else FAINT
        _arrow(axes, i, j, colour, 0.8 + 4 * share, "--" if not counts[e] else "-")
        x, y = _crest(i, j)
        axes.text(x, y, str(counts[e]), ha="center", va="center", fontsize=8, zorder=4,
                  bbox={"boxstyle": "round,pad=0.15", "fc": PAPER, "ec": "none"})  # fmt: skip
    for j in range(graph.states):
        _state(axes, j, INK)
    different = len(set(kept))
    used = sum(count > 0 for count in counts)
    axes.set_title(
        f"Shared graph: {used} of {len(graph.edges)} edges in use by {len(kept)} tasks, {different} topologies"
        "\n(numbers and line widths: tasks that keep the edge)",
        loc="left",
    )
    _frame(axes, graph)


def _task_panel(axes: Axes, sub: SubGraph, colour: str, name: str) -> None:
    graph, live = sub.graph, sub.live_states
    for e, (i, j) in enumerate(graph.edges):
        if not sub.edges[e]:
            _arrow(axes, i, j, FAINT, 0.7)
    for e, (i, j) in enumerate(graph.edges):
        if sub.edges[e]:
            _arrow(axes, i, j, colour, 2.0)
    for j in range(graph.states):
        _state(axes, j, colour if j in live else FAINT)
        for kept, begin, end in ((sub.read_in[j], (j, -0.62), (j, -0.22)), (sub.read_out[j], (j, 0.22), (j, 0.62))):
            if kept:
                arrow = FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=9, color=INK, lw=1.2, zorder=5)
                axes.add_patch(arrow)
    axes.set_title(f"{name}: {sum(sub.edges)} edges, depth {sub.depth}, width {sub.width}", loc="left", color=colour,
                   fontsize=10)  # fmt: skip
    _frame(axes, graph)


def _bend(i: int, j: int) -> float:
    """Curvature of an edge's arc: above the row of states for even spans, below it for odd ones, 0 for a span of 1."""
    span = j - i
    return 0.0 if span == 1 else (-1 if span % 2 == 0 else 1) * (0.42 if span == 2 else 0.38)


def _crest(i: int, j: int) -> tuple[float, float]:
    """The middle of an edge."""
    return (i + j) / 2, -_bend(i, j) * (j - i) / 2


def _arrow(axes: Axes, i: int, j: int, colour: str, width: float, style: str = "-") -> None:
    axes.add_patch(
        FancyArrowPatch(
            (i, 0), (j, 0), connectionstyle=f"arc3,rad={_bend(i, j)}", arrowstyle="-|>", mutation_scale=9,
            shrinkA=10, shrinkB=10, color=colour, lw=width, linestyle=style, zorder=1 if colour == FAINT else 2,
        )
    )  # fmt: skip


def _state(axes: Axes, j: int, colour: str) -> None:
    axes.add_patch(Circle((j, 0), 0.2, fc=colour, ec=PAPER, zorder=6))
    axes.text(j, 0, str(j + 1), ha="center", va="center", color=PAPER if colour != FAINT else "#777777", fontsize=8,
              zorder=7)  # fmt: skip


def _frame(axes: Axes, graph: Graph) -> None:
    reach = 0.5 + 0.21 * graph.flow
    for end in accumulate(graph.stages[:-1]):
        axes.axvline(end - 0.5, color="#999999", lw=0.8, linestyle=":", zorder=0)
    axes.set_xlim(-0.5, graph.states - 0.5)
    axes.set_ylim(-reach, reach)
    axes.set_aspect("equal")
    axes.axis("off")
