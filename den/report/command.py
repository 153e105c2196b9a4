"""den report: runs put together as tables, figures, and words."""

import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from den.data import ImageSet
from den.evaluate.accuracy import TaskReport, task_report
from den.evaluate.comparison import check_lines
from den.evaluate.operating import selector_logits
from den.nn.model import DeepElasticNetwork
from den.report.figures.neighbours import neighbours
from den.report.figures.selection import favourites, level_probabilities, structure_histogram
from den.report.figures.style import save_all
from den.report.figures.tradeoff import accuracy_against, initial_stage, sweep
from den.report.groups import Group, Row, Section, group_runs, sections, settings_of
from den.report.settings import Report
from den.report.tables import NOTES, Table, build_table, heading, machines
from den.report.verdicts import Points, verdicts
from den.runs.command import SetsOfRuns, look_up, measured, opened
from den.runs.evaluation import Evaluation, TaskResult
from den.support.files import check_folder, check_own, write_text
from den.support.progress import progress
from den.support.tables import csv_table, latex_table, markdown_table
from den.train.folder import read_metrics

WRITTEN_BY = "Written by `den report`"


@dataclass(frozen=True, eq=False)
class Found:
    """The runs of a report."""

    folders: dict[int, Path]  # by id of the record
    records: list[Evaluation]
    points: dict[int, list[Evaluation]]  # operating points at run time, by id of the run's record
    sets: SetsOfRuns


def main(command: Report) -> None:
    """Write the report, then print its tables and words; ValueError for wrong input, before anything is measured."""
    if not command.runs:
        raise ValueError("report: runs must be at least one run folder, got none")
    check_folder(command.out, "report: out")
    check_own(command.out / "report.md", WRITTEN_BY, "report: out")
    found = gather(command)
    texts, parts = [], [f"# Report\n\n{WRITTEN_BY}."]
    for section in sections(group_runs(found.records)):
        table = build_table(section)
        write_tables(table, command.out)
        texts.append(section_text(table, found.points, found.folders))
        names = draw(section, found, command) if command.figures else []
        parts.append("\n\n".join([texts[-1], *(f"![{name.stem}]({name.name})" for name in names)]))
    write_text(command.out / "report.md", "\n\n".join(parts) + "\n")
    print("\n\n".join(texts))
    print(f"\nden: the report is {command.out / 'report.md'}")


def gather(command: Report) -> Found:
    """The records of the runs, measured where there is none.

    Raises ValueError, before the first is measured, where a run, its images or a place for its record are missing.
    """
    folders = {folder.resolve(): folder for folder in reversed(command.runs)}
    runs = [
        look_up(folder, time=command.time, elsewhere=command.out / "measured" / _unique_name(place))
        for place, folder in reversed(folders.items())
    ]
    found = Found({}, [], {}, SetsOfRuns(command.data_root))
    for run in runs:
        if run.record is None or (command.figures and run.config.mode == "den"):
            found.sets.of(run)
    for run in progress(runs, "runs"):
        record, points = measured(run, found.sets, command.time)
        if run.record is None and run.place != run.folder:
            print(f"den: {run.folder} cannot be written to; what was measured of it is in {run.place}", flush=True)
        for each in (record, *(point for point in points if point.variant)):
            found.records.append(each)
            found.folders[id(each)], found.points[id(each)] = run.folder, []
        found.points[id(record)] = [point for point in points if point.budget]
    return found


def _unique_name(folder: Path) -> str:
    """A name that no other folder has."""
    return f"{folder.name}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]}"


def write_tables(table: Table, out: Path) -> None:
    """The table of a section as Markdown, CSV and LaTeX."""
    name = slug(table.section.title)
    write_text(out / f"{name}.md", markdown_table(table.short_head, table.rows) + "\n")
    write_text(out / f"{name}.csv", csv_table(table.head, table.rows))
    write_text(out / f"{name}.tex", latex_table(table.short_head, table.rows))


def section_text(table: Table, points: Points | None = None, folders: Mapping[int, Path] | None = None) -> str:
    """Title, table, notes and what holds or not, in Markdown.

    points, folders: operating points and folders of the runs, by the ids of their records.
    """
    checks = verdicts(table, points)
    failed = sum(check.holds is False for check in checks)
    words = f"{failed} of {len(checks)} claims do not hold" if checks else "No claim can be held against these runs"
    return "\n\n".join([
        f"## {table.section.title}",
        f"{heading(table)} Measured on: {machines(table.section)}.",
        markdown_table(table.short_head, table.rows),
        NOTES,
        *_repetitions(table.section, folders or {}),
        f"{words} (open: not decided by these runs):" + (f"\n\n```\n{check_lines(checks)}\n```" if checks else ""),
    ])  # fmt: skip


def _repetitions(section: Section, folders: Mapping[int, Path]) -> list[str]:
    """Remark on runs with the settings and the seed of another: only the one given first is shown."""
    lines = [
        f"{_name(other, folders)} has the settings and the seed {other.seed} of {_name(shown, folders)}, which was"
        " given first and is shown alone."
        for row in section.rows
        for group in row.groups
        for other, shown in group.repeated
    ]
    return ["\n".join(lines)] if lines else []


def _name(record: Evaluation, folders: Mapping[int, Path]) -> str:
    return f"`{folders[id(record)].name}`" if id(record) in folders else f"`{Path(record.settings['out']).name}`"


def slug(text: str) -> str:
    """A file name of words: ``slug("M1, wrn32_4") == "m1-wrn32-4"``."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def draw(section: Section, found: Found, command: Report) -> list[Path]:
    """The figures of a section, of what selectors chose only where they have been trained; returns their paths."""
    name = slug(section.title)
    records = [record for row in section.rows for group in row.groups for record in group.records]
    points = [point for record in records for point in found.points[id(record)]]
    drawings: dict[str, Figure] = {f"{name}-accuracy-flops": accuracy_against(section, "flops", points)}
    if any(result.timing for record in records for result in record.tasks):
        drawings[f"{name}-accuracy-ms"] = accuracy_against(section, "ms", points)
    for setting, groups in sweeps(section):
        drawings[f"{name}-sweep-{slug(setting)}"] = sweep(setting, groups)
        if setting == "estimator.initial":
            lines = {id(r): read_metrics(found.folders[id(r)]) for group in groups for r in group.records}
            drawings[f"{name}-initial-stage"] = initial_stage(setting, groups, lines)
    for row in section.rows:
        if row.method == "den" and not row.unfinished:
            drawings |= _selection_figures(f"{name}-{slug(row.label)}", row, found)
    return save_all(drawings, command.out)


def sweeps(section: Section) -> Iterator[tuple[str, list[Group]]]:
    """Settings, by flat name, in which two or more groups of a method differ while all their others are the same."""
    groups = [group for row in section.finished if row.method == "den" for group in row.groups]
    families: dict[tuple[str, str], list[Group]] = {}
    flat = {id(group): settings_of(group.first) for group in groups}
    for one, other in itertools.combinations(groups, 2):
        names = {*flat[id(one)], *flat[id(other)]}
        changed = [n for n in names if flat[id(one)].get(n) != flat[id(other)].get(n)]
        if len(changed) == 1 and one.tasks == other.tasks:
            rest = repr(sorted((n, str(v)) for n, v in flat[id(one)].items() if n != changed[0]))
            family = families.setdefault((changed[0], rest), [])
            family += [group for group in (one, other) if group not in family]
    for (name, _), members in families.items():
        values = {id(group): flat[id(group)][name] for group in members}
        numbers = all(isinstance(value, int | float) for value in values.values())
        yield name, sorted(members, key=lambda g: values[id(g)]) if numbers else members


def _selection_figures(name: str, row: Row, found: Found) -> dict[str, Figure]:
    """Figures of what the selector of a row's first run chose: 3, 6 and 7 of the paper."""
    drawings: dict[str, Figure] = {}
    for group in row.groups:
        record = group.first
        run = opened(found.folders[id(record)], record.checkpoint)
        sets = found.sets.of(run)
        chances = [selector_logits(run.model, image_set).log_softmax(-1) for image_set in sets]
        model = run.model.cpu()
        reports: Sequence[TaskReport] = [
            _selected(model, image_set, chance, result)
            for image_set, chance, result in zip(sets, chances, record.tasks, strict=True)
        ]
        of = name if len(row.groups) == 1 else f"{name}-{slug('-'.join(group.tasks))}"
        drawings |= {
            f"{of}-nearest": neighbours(sets, [chance.exp() for chance in chances]),
            f"{of}-levels": level_probabilities(reports, model),
            f"{of}-structures": structure_histogram(reports, model),
            f"{of}-favourites": favourites(reports, sets, model),
        }
    return drawings


def _selected(model: DeepElasticNetwork, image_set: ImageSet, chance: Tensor, result: TaskResult) -> TaskReport:
    """The report of a task whose images take the likeliest levels; chance: log probabilities [n, N, L]."""
    return task_report(model, image_set, chance.argmax(-1), chance, result.accuracy, result.loss)
