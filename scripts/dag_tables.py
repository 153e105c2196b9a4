"""The tables of docs/results/dag-omniglot.md and dag-dense-settings.md, from the runs of the scripts beside them.

    python scripts/dag_tables.py omniglot RUNS --data-root DATA          # measures finished runs that are new
    python scripts/dag_tables.py omniglot RUNS --data-root DATA --time   # and milliseconds, on one thread
    python scripts/dag_tables.py dense-settings runs/cards --write       # the tables into the page

RUNS: the folder of the runs; without it, the tables are made anew of what was measured before, which stands in the JSON
file beside each page.  Omniglot's runs are measured on its test images, those on cards on held-out scenes, all after
the last update.  Times are of the runs of seed 0.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from den.dag.evaluate import deployed_parameters
from den.dag.kinds import relative_gains
from den.report.dag.measured import RunReport, measure
from den.report.evidence import Interval, paired
from den.support.tables import markdown_table, write_section

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "results"
MAIN = {
    "dag": "**flow-based reduction**",
    "gates": "raw-gate ranking",
    "random": "random reduction",
    "hard": "hard sharing",
    "narrow": "hard sharing, 17 channels",
    "single": "single-task networks",
    "adashare": "AdaShare",
    "cross-stitch": "cross-stitch",
}
ABLATIONS = {
    "dag": "**as it is**",
    "no-squeeze": "no squeeze loss",
    "no-warm-up": "no warm-up",
    "no-fine-tuning": "no fine-tuning",
    "joint": "weights and gates in one step",
    "frozen": "shared weights at rest during the search",
    "no-read-in": "no read-in",
    "no-read-out": "no read-out",
    "flow5": "edges over up to 5 states",
    "flow7": "the unrestricted graph",
    "rerank": "the flow anew after every removal",
    "ends": "half of the read-ins and read-outs removed, too",
    "no-guard": "these, and no removal taken back",
    "bare": "gates of 1 where kept",
}
BALANCES = {
    "dag": "**losses added up**",
    "uncertainty": "uncertainty weighting",
    "dwa": "dynamic weight averaging",
    "pcgrad": "PCGrad",
    "cagrad": "CAGrad",
}
CARDS = {
    "base": "**gate rate 0.1**, N = 8, M = 3",
    "gate0.01": "gate rate 0.01",
    "gate0.3": "gate rate 0.3",
    "shares": "shares 0.1, 0.3, 0.6",
    "rate0.01": "learning rate 0.01",
    "flow2": "M = 2",
    "flow7": "M = 7, the unrestricted graph",
    "states6": "N = 6",
    "states12": "N = 12",
    "hard": "hard sharing, the whole graph",
}
NONE = "No such run has been made so far."
Values = dict[str, Any]  # what was measured of a run


def measured(run: RunReport) -> Values:
    """Metrics of a run by task, numbers of parameters and FLOPs, means over tasks, and the spread of its gates."""
    values = {
        "metrics": {task.name: run.results[task.name].metrics for task in run.model.tasks},
        "parameters": deployed_parameters(run.model),
        "task parameters": statistics.mean(cost.parameters for cost in run.costs),
        "flops": run.mean_flops,
        "spread": [min(cost.spread for cost in run.costs), max(cost.spread for cost in run.costs)],
        "topologies": run.topologies,
    }
    return {**values, "ms": 1e3 * run.mean_seconds} if run.seconds else values


def by_seed(runs: dict[str, Values], name: str) -> dict[int, Values]:
    """The runs of one kind, by seed."""
    found = {int(run.rpartition("-s")[2]): values for run, values in runs.items() if run.rpartition("-s")[0] == name}
    return dict(sorted(found.items()))


def mean_accuracy(values: Values) -> float:
    """Mean over tasks, 0..1."""
    return statistics.mean(each["accuracy"] for each in values["metrics"].values())


def mean_of(group: dict[int, Values], name: str) -> float:
    """Mean over seeds of a value."""
    return statistics.mean(values[name] for values in group.values())


def against(first: dict[int, float], group: dict[int, float]) -> list[str]:
    """Lead of the first kind of run over another, with its interval, and whether that decides anything."""
    if group == first:
        return ["", ""]
    gain = Interval.of(paired(first, group))
    return [gain.words(100), {True: "yes", False: "**no**", None: "open"}[gain.above()]]


def accuracy_table(runs: dict[str, Values], names: dict[str, str]) -> str:
    """A row for each kind of run on Omniglot, the first compared with the others; a sentence where there are none."""
    first, rows = {seed: mean_accuracy(values) for seed, values in by_seed(runs, next(iter(names))).items()}, []
    for name, label in names.items():
        if not (group := by_seed(runs, name)):
            continue
        accuracy = {seed: mean_accuracy(values) for seed, values in group.items()}
        timed = [values["ms"] for values in group.values() if "ms" in values]
        rows.append([
            label, ", ".join(map(str, group)), f"{statistics.mean(accuracy.values()):.2%}",
            f"{100 * statistics.stdev(accuracy.values()):.2f}" if len(group) > 1 else "", *against(first, accuracy),
            f"{mean_of(group, 'parameters'):,.0f}", f"{mean_of(group, 'task parameters'):,.0f}",
            f"{mean_of(group, 'flops') / 1e6:.2f}", f"{statistics.mean(timed):.2f}" if timed else "",
        ])  # fmt: skip
    if len(rows) < 2:
        return NONE
    ours = next(iter(names.values())).strip("*")
    head = ["network", "seeds", "mean accuracy", "deviation, points", f"{ours} better by, points [95 % interval]",
            "better", "parameters, all tasks", "parameters, one task", "MFLOP, one task", "ms, 32 images"]  # fmt: skip
    return markdown_table(head, rows)


def delta(values: Values, single: list[Values]) -> dict[str, float]:
    """Delta of each task, the mean of its metrics' relative gains over single-task networks."""
    found = {}
    for task, metrics in values["metrics"].items():
        alone = {name: statistics.mean(each["metrics"][task][name] for each in single) for name in metrics}
        kind = task.rpartition("-")[2]
        found[task] = statistics.mean(relative_gains(kind, metrics, alone).values())
    return found


def dense_table(runs: dict[str, Values], names: dict[str, str]) -> str:
    """A row for each kind of run on cards: Delta over the single-task networks, the first compared with the others; a
    sentence where there are none."""
    single, rows = [*by_seed(runs, "single").values()], []
    if not single or not any(by_seed(runs, name) for name in names):
        return NONE
    deltas = {name: {seed: delta(values, single) for seed, values in by_seed(runs, name).items()} for name in names}
    means = {
        name: {seed: statistics.mean(each.values()) for seed, each in group.items()} for name, group in deltas.items()
    }
    first, tasks = means[next(iter(names))], [*single[0]["metrics"]]
    for name, label in names.items():
        if not (group := by_seed(runs, name)):
            continue
        spread = [each for values in group.values() for each in values["spread"]]
        rows.append([
            label, ", ".join(map(str, group)),
            *(f"{100 * statistics.mean(each[task] for each in deltas[name].values()):+.1f}" for task in tasks),
            f"{100 * statistics.mean(means[name].values()):+.1f}", *against(first, means[name]),
            "" if name == "hard" else f"{min(spread):.2f} to {max(spread):.2f}", f"{mean_of(group, 'flops') / 1e6:.0f}",
        ])  # fmt: skip
    head = ["setting", "seeds", *(f"Delta {task}, %" for task in tasks), "over tasks",
            "first row better by, points [95 % interval]", "better", "gate spread", "MFLOP, mean of tasks"]  # fmt: skip
    return markdown_table(head, rows)


Maker = Callable[[dict[str, Values], dict[str, str]], str]
PAGES: dict[str, tuple[Maker, dict[str, dict[str, str]]]] = {
    "omniglot": (accuracy_table, {"main": MAIN, "ablations": ABLATIONS, "balances": BALANCES}),
    "dense-settings": (dense_table, {"cards": CARDS}),
}


def measure_new(runs: dict[str, Values], folder: Path, data_root: Path | None, time: bool) -> dict[str, Values]:
    """Measure the finished runs of a folder that are new, with `time` those of seed 0 again, and add them to `runs`."""
    found = dict(runs)
    for done in sorted(folder.glob("*-s*.done")):
        name = done.name.removesuffix(".done")
        timed = time and name.endswith("-s0")
        if name not in found or timed:
            found[name] = measured(measure(folder / name, data_root, timed))
    return dict(sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=PAGES)
    parser.add_argument("runs", type=Path, nargs="?", help="folder of the runs; none: what was measured before")
    parser.add_argument("--data-root", type=Path, help="folder of the images; none: where the runs had them")
    parser.add_argument("--time", action="store_true", help="measure milliseconds of the runs of seed 0")
    parser.add_argument("--write", action="store_true", help="write the tables into the page")
    given = parser.parse_args()
    page, stored = FOLDER / f"dag-{given.page}.md", FOLDER / f"dag-{given.page}.json"
    runs = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
    torch.set_num_threads(1)
    if given.runs is not None:
        runs = measure_new(runs, given.runs, given.data_root, given.time)
        stored.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    make, parts = PAGES[given.page]
    tables = {part: make(runs, names) for part, names in parts.items()}
    print("\n\n".join(tables.values()))
    if given.write:
        for part, made in tables.items():
            write_section(page, part, made)


if __name__ == "__main__":
    main()
