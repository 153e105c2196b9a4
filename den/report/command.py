"""den report: runs put together as tables, figures, and words."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

from den.comparison import check_lines
from den.evaluate import TaskReport, task_report
from den.evaluation import Evaluation, TaskResult
from den.figures.neighbours import neighbours
from den.figures.selection import favourites, level_probabilities, structure_histogram
from den.figures.style import save_all
from den.figures.tradeoff import accuracy_against, sweep
from den.measure import evaluations, opened, sets_of
from den.operating import selector_logits
from den.report.groups import Group, Row, Section, group_runs, sections, settings_of
from den.report.settings import Report
from den.report.tables import NOTES, Table, build_table, heading, machines
from den.report.verdicts import Points, verdicts
from den.tables import csv_table, latex_table, markdown_table


@dataclass(frozen=True, eq=False)
class Found:
    """The runs of a report."""

    folders: dict[int, Path]  # by id of the record
    records: list[Evaluation]
    points: dict[int, list[Evaluation]]  # operating points at run time, by id of the run's record


def main(command: Report) -> None:
    """Write the report and print its tables and words; ValueError for wrong input."""
    if not command.runs:
        raise ValueError("report: runs must be at least one run folder, got none")
    found = gather(command)
    command.out.mkdir(parents=True, exist_ok=True)
    parts = ["# Report\n\nWritten by `den report`."]
    for section in sections(group_runs(found.records)):
        table = build_table(section)
        write_tables(table, command.out)
        text = section_text(table, found.points)
        print(text, flush=True)
        names = draw(section, found, command) if command.figures else []
        parts.append("\n\n".join([text, *(f"![{name.stem}]({name.name})" for name in names)]))
    (command.out / "report.md").write_text("\n\n".join(parts) + "\n")
    print(f"\nden: the report is {command.out / 'report.md'}")


def gather(command: Report) -> Found:
    """The records of the runs, measured where there is none."""
    found = Found({}, [], {})
    for folder in tqdm(dict.fromkeys(command.runs), desc="runs", leave=False, disable=None):
        record, points = evaluations(folder, command.data_root, command.time)
        found.records.append(record)
        found.folders[id(record)], found.points[id(record)] = folder, points
    return found


def write_tables(table: Table, out: Path) -> None:
    """The table of a section as Markdown, CSV and LaTeX."""
    name = slug(table.section.title)
    (out / f"{name}.md").write_text(markdown_table(table.short_head, table.rows) + "\n")
    (out / f"{name}.csv").write_text(csv_table(table.head, table.rows))
    (out / f"{name}.tex").write_text(latex_table(table.short_head, table.rows))


def section_text(table: Table, points: Points | None = None) -> str:
    """Title, table, notes and what holds or not, in Markdown; points: operating points of the runs."""
    checks = verdicts(table, points)
    failed = sum(check.holds is False for check in checks)
    words = f"{failed} of {len(checks)} claims do not hold" if checks else "No claim can be held against these runs"
    return "\n\n".join([
        f"## {table.section.title}",
        f"{heading(table)} Measured on: {machines(table.section)}.",
        markdown_table(table.short_head, table.rows),
        NOTES,
        f"{words} (?: not decided by these runs):" + (f"\n\n```\n{check_lines(checks)}\n```" if checks else ""),
    ])  # fmt: skip


def slug(text: str) -> str:
    """A file name of words: ``slug("M1, wrn32_4") == "m1-wrn32-4"``."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def draw(section: Section, found: Found, command: Report) -> list[Path]:
    """The figures of a section; returns their paths."""
    name = slug(section.title)
    records = [record for row in section.rows for group in row.groups for record in group.records]
    points = [point for record in records for point in found.points[id(record)]]
    drawings: dict[str, Figure] = {f"{name}-accuracy-flops": accuracy_against(section, "flops", points)}
    if any(result.timing for record in records for result in record.tasks):
        drawings[f"{name}-accuracy-ms"] = accuracy_against(section, "ms", points)
    for setting, groups in sweeps(section):
        drawings[f"{name}-sweep-{slug(setting)}"] = sweep(setting, groups)
    for row in section.rows:
        if row.method == "den":
            drawings |= _selection_figures(f"{name}-{slug(row.label)}", row, found, command)
    return save_all(drawings, command.out)


def sweeps(section: Section) -> Iterator[tuple[str, list[Group]]]:
    """Settings, by flat name, in which two or more groups of a method differ while all their others are the same."""
    groups = [group for row in section.rows if row.method == "den" for group in row.groups]
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


def _selection_figures(name: str, row: Row, found: Found, command: Report) -> dict[str, Figure]:
    """What the selector of a row's first run chose: figures 3, 6 and 7 of the paper."""
    drawings: dict[str, Figure] = {}
    for group in row.groups:
        record = group.first
        run = opened(found.folders[id(record)], record.checkpoint)
        sets = sets_of(run, command.data_root)
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


def _selected(model, image_set, chance, result: TaskResult) -> TaskReport:
    return task_report(model, image_set, chance.argmax(-1), chance, result.accuracy, result.loss)
