"""Runs over one graph side by side, and what they show."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from den.dag.evaluate import deployed_parameters
from den.report.dag.measured import RunReport
from den.support.tables import markdown_table

Groups = dict[tuple[str, str], dict[int, RunReport]]
"""By label and updates, and by seed."""


def reference(runs: Sequence[RunReport]) -> RunReport:
    """The run that the others are compared with: the first that has finished."""
    return next((run for run in runs if run.finished), runs[0])


def grouped(runs: Sequence[RunReport]) -> Groups:
    """Runs that differ in nothing but their seed; of the same seed the first counts.

    Unfinished runs stand apart from the finished ones by their updates, "40 of 4,000".
    """
    groups: Groups = {}
    for run in runs:
        groups.setdefault((run.label(reference(runs)), run.updates), {}).setdefault(run.config.seed, run)
    return groups


def comparison(runs: Sequence[RunReport]) -> str:
    """A row per kind of run and number of updates: means over its seeds, and what the first kind has above each, seed
    by seed, after as many updates."""
    groups, first, rows = grouped(runs), reference(runs).kind, []
    for (label, updates), group in groups.items():
        accuracy = [run.accuracy for run in group.values()]
        finished = all(run.finished for run in group.values())
        peers = groups.get((first, updates), {}) if label != first and finished else {}
        gains = [100 * (peers[seed].accuracy - run.accuracy) for seed, run in group.items() if seed in peers]
        of_task = [statistics.mean(cost.parameters for cost in run.costs) for run in group.values()]
        rows.append([
            label if finished else f"{label}, unfinished", updates, ", ".join(map(str, sorted(group))),
            f"{statistics.mean(accuracy):.2%}", f"{100 * statistics.stdev(accuracy):.2f}" if len(accuracy) > 1 else "",
            ", ".join(f"{gain:+.2f}" for gain in gains),
            f"{statistics.mean(deployed_parameters(run.model) for run in group.values()):,.0f}",
            f"{statistics.mean(of_task):,.0f}",
            f"{statistics.mean(run.mean_flops for run in group.values()) / 1e6:.2f}",
            f"{statistics.mean(run.topologies for run in group.values()):.1f}",
        ])  # fmt: skip
    head = ("network", "updates", "seeds", "mean accuracy", "deviation, points", f"{first} better by, points",
            "parameters, all tasks", "parameters, one task", "MFLOP, one task", "topologies")  # fmt: skip
    return "\n\n".join([markdown_table(head, rows), *repetitions(runs)])


def repetitions(runs: Sequence[RunReport]) -> list[str]:
    """Remark on runs with the settings and the seed of another: only the one given first is compared."""
    groups, lines = grouped(runs), []
    for run in runs:
        shown = groups[run.label(reference(runs)), run.updates][run.config.seed]
        if shown is not run:
            lines.append(
                f"`{run.path.name}` has the settings and the seed {run.config.seed} of `{shown.path.name}`, which was"
                " given first and is compared alone."
            )
    return ["\n".join(lines)] if lines else []


def verdicts(runs: Sequence[RunReport]) -> str:
    """Verdicts, as Markdown: the first kind of run is at least as accurate as each other kind, or it is not.

    Compared are finished runs with as many updates, over the seeds that both kinds have.
    """
    groups = grouped([run for run in runs if run.finished])
    first, lines = reference(runs).kind, ["What this is to show:", ""]
    for (label, updates), theirs in groups.items():
        seeds = sorted(set(theirs) & set(groups.get((first, updates), {})))
        if label == first or not seeds:
            continue
        means = [statistics.mean(each[seed].accuracy for seed in seeds) for each in (groups[first, updates], theirs)]
        ours, other = means
        lines.append(
            f"- {'yes' if ours >= other else '**no**'}: after {updates} updates {first} at least as accurate as"
            f" {label}: {ours:.2%} against {other:.2%} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
        )
    lines += [
        f"- **no**: {run.label(reference(runs))}, seed {run.config.seed}, trained to the end: {run.updates} updates"
        for run in runs
        if not run.finished
    ]
    return "\n".join(lines)
