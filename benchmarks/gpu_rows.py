"""A pytest plugin for `benchmarks.gpu_check`: what every check came to, in a file that outlives the process.

The file holds lines of JSON: {"collected": names}; {"begin": name} for each check that begins; for each that ends
"check" (its name), "status" (ok, failed, skipped), "seconds", "error" or "reason", what it recorded (`record_property`)
and the row of a timed case; {"finished": status} at the end of all. A process that begins with such a file goes on
behind the checks in it. After a fault that leaves the device dead the process ends.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

DEAD = 70  # exit status: the device answers nothing in this process any more
OUT_OF_TIME = "out of time"
Row = dict[str, Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks.gpu_check")
    group.addoption("--rows", type=Path, help="file for what every check came to")
    group.addoption("--until", type=float, default=float("inf"), help="Unix time from which on checks are skipped")
    group.addoption("--rehearse", action="store_true", help="tiny sizes (with -p benchmarks.rehearsal)")


def name_of(item: pytest.Item) -> str:
    """A timed case by its own name, any other check as pytest calls it."""
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    return getattr(case, "id", None) or item.nodeid.removeprefix("tests/gpu/")


def append(config: pytest.Config, entry: Mapping[str, Any]) -> None:
    """Append an entry to the run's file, where it has one."""
    if (path := config.getoption("--rows")) is not None:
        append_to(path, entry)


def append_to(path: Path, entry: Mapping[str, Any]) -> None:
    """Append an entry as one line, on disk when this returns; other processes may append too."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """The lines of a file; one that was cut off is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--rows") is not None and not hasattr(config, "workerinput"):  # workers collect alike
        begun = {entry.get("begin") for entry in read(config.getoption("--rows"))}
        items[:] = [item for item in items if name_of(item) not in begun]
    append(config, {"collected": [name_of(item) for item in items]})


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not hasattr(session.config, "workerinput"):
        append(session.config, {"finished": int(exitstatus)})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    append(item.config, {"begin": name_of(item)})
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > item.config.getoption("--until"):
        pytest.skip(OUT_OF_TIME)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if report.when == "call" or not report.passed:
        append(item.config, row_of(item, call, report))
        if report.failed and is_dead():
            os._exit(DEAD)
    return report


def row_of(item: pytest.Item, call: pytest.CallInfo, report: pytest.TestReport) -> Row:
    """Row of a finished check: its status, and the reason, error or times."""
    row: Row = {"check": name_of(item), "status": {"passed": "ok"}.get(report.outcome, report.outcome)}
    if report.skipped:
        row["reason"] = str(report.longrepr[2]).removeprefix("Skipped: ")
    elif report.failed:
        row["error"] = " ".join(call.excinfo.exconly().split())[:600]
        own = [entry for entry in call.excinfo.traceback if "site-packages" not in str(entry.path)]
        row["where"] = [f"{entry.path.name}:{entry.lineno + 1}" for entry in own[-4:]]
    timed = getattr(item, "funcargs", {}).get("benchmark")
    return row | {"seconds": round(report.duration, 3)} | dict(item.user_properties) | getattr(timed, "extra_info", {})


def is_dead() -> bool:
    """True where the device refuses everything after a fault."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
