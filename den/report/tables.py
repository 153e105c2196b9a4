"""Tables 2 to 5 of the paper, ours with the paper's numbers beside them: one line per method and task."""

from dataclasses import dataclass

from den.report.groups import Row, Section, Stat
from den.report.paper import MEAN, PaperEntry, entries, has_tasks, nearest_backbone

MOST_TASKS = 6  # beyond this only the mean over them
SEPARATE = ("c1",)  # scenarios of tasks that have nothing to do with each other: no mean over them

PAPER = "paper: "
HEAD = (
    "method", "task", "seeds", "accuracy %", f"{PAPER}accuracy %", "Δ dense", f"{PAPER}Δ dense", "MFLOP",
    f"{PAPER}MFLOP", "times fewer", f"{PAPER}times fewer", "parameters M", f"{PAPER}parameters M", "ms dense", "ms",
    "times as fast", "structures", "entropy",
)  # fmt: skip

NOTES = """\
Mean ± standard deviation over seeds, on the test images. Δ dense: points above the dense network (the mean of its
seeds) on the same task. MFLOP: twice the multiply-adds of the blocks, mean per image, in millions; times fewer: than
the full structure. Parameters: weights of the blocks, of VGG and SimpleConvNet with the fully connected layers, of all
networks that the row needs; in C1 those that an image uses, as in Table 5. The paper's numbers stand only beside
networks that have learnt the same tasks; its Table 3 counts multiply-adds and is doubled here. ms: measured per image,
with choosing; ms dense: the full structure, in the faster of plain convolutions and our kernels. Entropy: of the
structures in use, in nats."""


@dataclass(frozen=True)
class Line:
    """Line of a table before it is text.  None: not there."""

    label: str
    task: str
    row: Row | None
    paper: PaperEntry | None


@dataclass(frozen=True, eq=False)
class Table:
    """The lines of a section, and what its paper's columns are of."""

    section: Section
    paper_backbone: str | None
    numbers: tuple[str, ...]  # of the paper's tables
    lines: tuple[Line, ...]

    @property
    def comparable(self) -> bool:
        """True where the paper has this very backbone, so that its accuracies and FLOPs stand beside ours."""
        return self.paper_backbone == self.section.backbone

    @property
    def head(self) -> list[str]:
        """Names of the columns; the paper's only where it has such a table."""
        return [name for name in HEAD if self.numbers or not name.startswith(PAPER)]

    @property
    def short_head(self) -> list[str]:
        """Names of the columns as printed: each of the paper's is "paper", and stands beside ours."""
        return ["paper" if name.startswith(PAPER) else name for name in self.head]

    @property
    def rows(self) -> list[list[str]]:
        """The cells, in the order of `head`."""
        return [_cells(self, line) for line in self.lines]

    def paper_dense(self, task: str) -> PaperEntry | None:
        found = entries(self.section.scenario, self.paper_backbone) if self.paper_backbone else []
        return next((e for e in found if e.method == "dense" and e.task == task), None)


def build_table(section: Section) -> Table:
    """Our rows, each task and the mean; of the very same backbone also what only the paper has."""
    backbone = nearest_backbone(section.scenario, section.backbone)
    papers = entries(section.scenario, backbone) if backbone else []
    lines, used = [], set()
    for row in section.rows:
        for task in _shown_tasks(section, row.tasks):
            paper = next((e for e in papers if (e.method, e.rho, e.task) == (row.method, row.rho, task)), None)
            paper = paper if backbone and _fits(section.scenario, backbone, row, task) else None
            used.add(paper)
            lines.append(Line(row.label, task, row, paper))
    numbers = tuple(dict.fromkeys(entry.table for entry in papers))
    if not backbone or not has_tasks(section.scenario, backbone, section.tasks, alone=True):
        numbers = ()
    elif backbone == section.backbone:
        lines += [Line(_paper_label(e), e.task, None, e) for e in papers if e not in used]
    return Table(section, backbone, numbers, tuple(lines))


def _fits(scenario: str | None, backbone: str, row: Row, task: str) -> bool:
    """Return True where a row has learnt the tasks of the paper's; a mean is over all of them."""
    separate = row.method == "dense" and len(row.groups) == len(row.tasks) and task != MEAN
    return has_tasks(scenario, backbone, row.tasks, alone=separate)


def _shown_tasks(section: Section, tasks: tuple[str, ...]) -> tuple[str, ...]:
    shown = tasks if len(tasks) <= MOST_TASKS else ()
    averaged = len(tasks) > 1 and section.scenario not in SEPARATE
    return (*shown, MEAN) if averaged else tasks


def _paper_label(entry: PaperEntry) -> str:
    return f"DEN (rho = {entry.rho:g})" if entry.method == "den" else entry.method


def _cells(table: Table, line: Line) -> list[str]:
    row, task, paper = line.row, line.task, line.paper
    dense, paper_dense = table.section.dense, table.paper_dense(task)
    absolute = paper if table.comparable else None
    ours = _our_cells(table.section, row, task, dense) if row else {}
    change = paper.accuracy - paper_dense.accuracy if paper and paper_dense and paper.method != "dense" else None
    theirs = {
        "accuracy %": _number(absolute.accuracy if absolute else None, "{:.2f}"),
        "Δ dense": _number(change, "{:+.2f}"),
        "MFLOP": _number(absolute.flops if absolute else None, "{:.1f}", 1e-6),
        "times fewer": _number(paper.fewer if paper else None, "{:.2f}"),
        "parameters M": _number(absolute.parameters if absolute else None, "{:.2f}", 1e-6),
    }
    cells = (
        theirs[name.removeprefix(PAPER)] if name.startswith(PAPER) else ours.get(name, "") for name in table.head[2:]
    )
    return [line.label, task, *cells]


def _our_cells(section: Section, row: Row, task: str, dense: Row | None) -> dict[str, str]:
    accuracy, flops = row.stat("accuracy", task), row.stat("flops", task)
    compared = dense if dense is not None and row.method != "dense" and (task == MEAN or task in dense.tasks) else None
    timing = {name: None if task == MEAN else row.timing(name, task) for name in ("dense", "selected", "speedup")}
    parameters = row.used_parameters(task) if section.scenario in SEPARATE else row.parameters
    ratio = row.stat("flops_ratio", task).mean
    return {
        "seeds": str(accuracy.count),
        "accuracy %": _stat(accuracy, 100, 2),
        "Δ dense": f"{100 * (accuracy.mean - compared.stat('accuracy', task).mean):+.2f}" if compared else "",
        "MFLOP": _stat(flops, 1e-6, 1),
        "times fewer": f"{1 / ratio:.2f}" if ratio else "",
        "parameters M": f"{parameters / 1e6:.3f}",
        "ms dense": _stat(timing["dense"], 1e3, 3),
        "ms": _stat(timing["selected"], 1e3, 3),
        "times as fast": _stat(timing["speedup"], 1, 2),
        "structures": "" if task == MEAN else _stat(row.stat("structures", task), 1, 0),
        "entropy": "" if task == MEAN else _stat(row.stat("variety", task), 1, 2),
    }


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else form.format(value * unit)


def _stat(stat: Stat | None, scale: float, digits: int) -> str:
    if stat is None:
        return ""
    text = f"{scale * stat.mean:.{digits}f}"
    return text if stat.deviation is None else f"{text} ± {scale * stat.deviation:.{digits}f}"


def heading(table: Table) -> str:
    """Sentence that names the table of the paper beside ours, and says which of its columns compare."""
    of = f"Table {' and '.join(table.numbers)}" if table.numbers else ""
    if not table.numbers:
        known = entries(table.section.scenario, table.paper_backbone) if table.paper_backbone else []
        theirs = f" (table {', '.join(dict.fromkeys(e.table for e in known))} is of others)" if known else ""
        return f"The paper has no table of these tasks{theirs}: nothing of it stands here."
    if table.comparable:
        return f"Beside {of} of the paper."
    return (
        f"{of} of the paper has {table.paper_backbone}, not {table.section.backbone}: its accuracies, FLOPs and"
        " parameters do not compare and are left out; its changes from its own baseline stand beside ours."
    )


def machines(section: Section) -> str:
    """Machines on which the runs of a section were measured, with platform and torch release."""
    records = [record for row in section.rows for group in row.groups for record in group.records]
    return "; ".join(
        dict.fromkeys(f"{r.machine}, {r.versions['platform']}, torch {r.versions['torch']}" for r in records)
    )
