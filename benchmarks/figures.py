"""Figures of one machine's results: realised fraction, time against the batch, roofline; titles say what was found."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from den.report.figures.style import GREY, INK, STYLE

from .losses import best_alternative
from .targets import Row

MIXES = {"quarter": "#9ecae1", "uniform": "#d1495b", "skewed": "#edae49", "one-odd": "#66a182", "full": "#222222"}
LINES = {"ours": "#d1495b", "dense": "#222222", "bucket": "#4292c6", "masked": "#b5b8bd"}
WHAT = {"latency-block": "residual block", "latency-network": "network", "residual": "residual block"}


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw what the rows allow into ``folder`` as PNG; the paths."""
    drawings: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
        "realised": realised,
        "batch": time_against_batch,
        "roofline": roofline,
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, draw in drawings.items():
            figure = draw(rows)
            if figure is not None:
                paths.append(folder / f"{name}.png")
                figure.savefig(paths[-1])
    return paths


def realised(rows: Sequence[Row]) -> Figure | None:
    """Realised fraction of the residual block by shape, batch and mix, a panel for each dtype."""
    kept = [row for row in rows if row["suite"] == "residual" and row["mix"] in MIXES and row.get("flops_ratio")]
    if not kept:
        return None
    dtypes = sorted({row["dtype"] for row in kept}, reverse=True)
    shapes = sorted({(_channels(row), row["batch"], row["shape"]) for row in kept}, reverse=True)
    names = [f"{shape}, B = {batch}" for _, batch, shape in shapes]
    figure = Figure(figsize=(4.6 * len(dtypes) + 1, 0.42 * len(names) + 1.6), layout="constrained")
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axes, dtype in zip(panels, dtypes, strict=True):
        own = [row for row in kept if row["dtype"] == dtype]
        for mix, colour in MIXES.items():
            points = [
                (row["providers"]["ours"]["realised"], shapes.index((_channels(row), row["batch"], row["shape"])))
                for row in own
                if row["mix"] == mix
            ]
            if points:
                axes.scatter(*zip(*points, strict=True), color=colour, s=55, label=mix, zorder=3)
        axes.axvline(1, color=GREY, lw=1.5)
        axes.set(xlabel="realised fraction (1: FLOPs saved = time saved)", yticks=range(len(names)))
        axes.set_yticklabels(names)
        axes.set_xlim(left=0)
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
        least = min(row["providers"]["ours"]["realised"] for row in own)
        axes.set_title(f"{dtype}: at least {least:.2f} realised")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(MIXES), frameon=False)
    return figure


def plain_numbers(axis: Axis) -> None:
    """1, 2, 5, 10, ... in digits on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def _channels(row: Row) -> int:
    return int(row["shape"].split("x")[0])


def time_against_batch(rows: Sequence[Row]) -> Figure | None:
    """Microseconds an image against the batch, for ours, dense and bucket: where the lines cross."""
    kinds = sorted({(row["suite"], row["shape"]) for row in rows if row["suite"].startswith("latency-")})
    series = {
        kind: sorted((row for row in rows if (row["suite"], row["shape"]) == kind), key=lambda row: row["batch"])
        for kind in kinds
    }
    series = {kind: own for kind, own in series.items() if len(own) > 1}
    if not series:
        return None
    figure = Figure(figsize=(5.4 * len(series), 4.4), layout="constrained")
    for axes, (kind, own) in zip(figure.subplots(1, len(series), squeeze=False)[0], series.items(), strict=True):
        _batch_panel(axes, *kind, own)
    return figure


def _batch_panel(axes: Axes, suite: str, shape: str, rows: Sequence[Row]) -> None:
    for name, colour in LINES.items():
        points = [(row["batch"], seconds) for row in rows if (seconds := _seconds(row, name)) is not None]
        if points:
            batches, seconds = zip(*points, strict=True)
            each = [1e6 * s / b for b, s in points]
            width = 2.5 if name == "ours" else 1.5
            axes.plot(
                batches, each, marker="o", color=colour, lw=width, label="best dense" if name == "dense" else name
            )
    axes.set(xscale="log", yscale="log", xlabel="images in a batch", ylabel="us per image")
    axes.set_xticks([row["batch"] for row in rows], [f"{row['batch']:,}" for row in rows])
    axes.xaxis.set_minor_locator(NullLocator())
    plain_numbers(axes.yaxis)
    axes.grid(color="#eeeeee")
    axes.set_title(f"{WHAT[suite]} {shape}: {fastest_from(rows)}")
    axes.legend(frameon=False)


def _seconds(row: Row, name: str) -> float | None:
    provider = row["best_dense"] if name == "dense" else name
    return row["providers"].get(provider, {}).get("median")


def fastest_from(rows: Sequence[Row]) -> str:
    """Sentence on the batch from which ours is the fastest provider; rows in ascending order of the batch."""
    wins = [_seconds(row, "ours") <= row["providers"][best_alternative(row)]["median"] for row in rows]
    first = len(wins)
    while first and wins[first - 1]:
        first -= 1
    if first == len(wins):
        return "something else is the fastest at the largest batch"
    return "ours is the fastest at every batch" if first == 0 else f"ours is the fastest from {rows[first]['batch']} on"


def roofline(rows: Sequence[Row]) -> Figure | None:
    """FLOP/s reached against FLOPs a byte, below the measured ceilings of the machine, a panel for each dtype."""
    kept = [row for row in rows if row.get("flops") and row.get("matrix_rate") and row["suite"] != "norm"]
    if not kept:
        return None
    dtypes = sorted({row["dtype"] for row in kept}, reverse=True)
    figure = Figure(figsize=(5.6 * len(dtypes), 4.4), layout="constrained")
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
        _roofline_panel(axes, dtype, [row for row in kept if row["dtype"] == dtype])
    return figure


def _roofline_panel(axes: Axes, dtype: str, rows: Sequence[Row]) -> None:
    rate, bandwidth = rows[0]["matrix_rate"], rows[0]["bandwidth"]
    kinds = (("dense", GREY, "dense_flops", "s"), ("ours", "#d1495b", "flops", "o"))
    for name, colour, work, marker in kinds:
        points = [
            (row[work] / row["traffic"], row[work] / seconds / 1e9)
            for row in rows
            if row["traffic"] and (seconds := _seconds(row, name))
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), s=22, color=colour, marker=marker, label=name, alpha=0.8)
    intensity = [row["flops"] / row["traffic"] for row in rows if row["traffic"]]
    left, right = min(*intensity, rate / bandwidth) / 2, max(*intensity, rate / bandwidth) * 4
    axes.plot([left, rate / bandwidth, right], [left * bandwidth / 1e9, rate / 1e9, rate / 1e9], color=INK, lw=1.5)
    text = f"matrix rate {rate / 1e9:.0f} GFLOP/s"
    axes.annotate(text, (right, rate / 1e9), (0, 4), textcoords="offset points", ha="right", va="bottom")
    axes.set_ylim(top=2 * rate / 1e9)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="GFLOP/s")
    plain_numbers(axes.yaxis)
    axes.grid(color="#eeeeee")
    shares = sorted(row["flops"] / row["providers"]["ours"]["median"] / rate for row in rows)
    axes.set_title(f"{dtype}: ours reaches {shares[len(shares) // 2]:.0%} of the matrix rate (median)")
    axes.legend(frameon=False, loc="lower right")
