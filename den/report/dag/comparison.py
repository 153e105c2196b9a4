"""Runs over one graph side by side, and what they show."""

import statistics
from collections.abc import Mapping, Sequence

from den.dag.evaluate import deployed_parameters
from den.evaluate.comparison import Check
from den.report.dag.measured import RunReport, timed_images
from den.report.evidence import Interval, judged, paired
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
    """A row per kind of run and number of updates: means over its seeds, and what the first kind has above each, after
    as many updates, over the seeds that both have and with its interval."""
    groups, first, rows = grouped(runs), reference(runs).kind, []
    for (label, updates), group in groups.items():
        accuracy = [run.accuracy for run in group.values()]
        finished = all(run.finished for run in group.values())
        peers = groups.get((first, updates), {}) if label != first and finished else {}
        gains = paired(_accuracies(peers), _accuracies(group))
        of_task = [statistics.mean(cost.parameters for cost in run.costs) for run in group.values()]
        rows.append([
            label if finished else f"{label}, unfinished", updates, ", ".join(map(str, sorted(group))),
            f"{statistics.mean(accuracy):.2%}", f"{100 * statistics.stdev(accuracy):.2f}" if len(accuracy) > 1 else "",
            Interval.of(gains).words(100) if gains else "",
            f"{statistics.mean(deployed_parameters(run.model) for run in group.values()):,.0f}",
            f"{statistics.mean(of_task):,.0f}",
            f"{statistics.mean(run.mean_flops for run in group.values()) / 1e6:.2f}",
            *([f"{1e3 * statistics.mean(run.mean_seconds for run in group.values()):.2f}"] if _timed(runs) else []),
            f"{statistics.mean(run.topologies for run in group.values()):.1f}",
        ])  # fmt: skip
    head = ("network", "updates", "seeds", "mean accuracy", "deviation, points",
            f"{first} better by, points [95 % interval]", "parameters, all tasks", "parameters, one task",
            "MFLOP, one task", *([f"ms per {timed_images(runs[0].model)} images"] if _timed(runs) else []),
            "topologies")  # fmt: skip
    return "\n\n".join([markdown_table(head, rows), *repetitions(runs), *published(runs)])


def published(runs: Sequence[RunReport]) -> list[str]:
    """Remark on published results of the runs' protocol, where it has any."""
    if not all(run.config.data.scenario == "omniglot" and run.config.data.protocol == "mtl20" for run in runs):
        return []
    return [
        "Published on this protocol, with subsets of alphabets that the papers do not name: 95.71 % (Choi and Im, CVPR"
        " 2023, by third-party listings), others 92.19 % and 93.52 %."
    ]


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
    """Verdicts, as Markdown: the first kind of run is more accurate than each other kind, is not, or that is open.

    Compared are finished runs with as many updates, over the seeds that both kinds have, by the rule of
    `den.report.evidence`.
    """
    groups = grouped([run for run in runs if run.finished])
    first, found = reference(runs).kind, []
    for (label, updates), theirs in groups.items():
        ours = groups.get((first, updates), {})
        seeds = sorted(set(theirs) & set(ours))
        if label == first or not seeds:
            continue
        values = [statistics.mean(each[seed].accuracy for seed in seeds) for each in (ours, theirs)]
        costs = [statistics.mean(each[seed].mean_flops for seed in seeds) / 1e6 for each in (ours, theirs)]
        claim = (
            f"after {updates} updates {first} more accurate than {label}: {values[0]:.2%} against {values[1]:.2%}"
            f" (MFLOP: {costs[0]:.2f} against {costs[1]:.2f})"
        )
        trained = all(ours[seed].trained for seed in seeds)
        found.append(judged(claim, paired(_accuracies(ours), _accuracies(theirs)), scale=100, trained=trained))
    found += [
        Check(
            f"{run.label(reference(runs))}, seed {run.config.seed}, trained to the end", f"{run.updates} updates", False
        )
        for run in runs
        if not run.finished
    ]
    words = {True: "yes", False: "**no**", None: "open"}
    lines = [f"- {words[check.holds]}: {check.claim}: {check.measured}" for check in found]
    title = "What this is to show (points, paired over seeds, with the 95 % interval; open: not decided by these runs):"
    return "\n".join([title, "", *lines])


def _accuracies(group: Mapping[int, RunReport]) -> dict[int, float]:
    """Mean accuracies by seed."""
    return {seed: run.accuracy for seed, run in group.items()}


def _timed(runs: Sequence[RunReport]) -> bool:
    """True where every run was timed."""
    return all(run.seconds for run in runs)
