"""Options, machine settings and the closing table of ``pytest benchmarks/``."""

import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from den.support.call_time import keep_allocations_on_the_heap

from . import engines, floors, tables
from .harness import PROVIDERS, Settings

FOLDER = Path(__file__).parent

# At import, before torch has made a tensor that matters.
ALLOCATOR = keep_allocations_on_the_heap()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("den_kernels benchmarks")
    group.addoption("--case-seconds", type=float, default=0.7, help="time to spend on the rounds of a case")
    group.addoption("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of the CPU (default 2)")
    group.addoption("--all-cases", action="store_true", help="also the cases that add little: several times as long")
    group.addoption("--provider", action="append", default=[], metavar="NAME", help="time only this one beside ours")
    group.addoption(
        "--dense-compile",
        choices=("none", "network", "all"),
        default="network",
        help="where the dense side is also run through torch.compile (compilation takes a minute or so a network)",
    )
    group.addoption("--autotune", action="store_true", help="search for the kernels of the compiled dense side (GPU)")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))


def is_wanted(item: pytest.Item, config: pytest.Config) -> bool:
    """Tiny cases in a rehearsal and no others; else those that a GPU or ``--all-cases`` is there for."""
    if FOLDER not in item.path.parents:
        return True
    marks, rehearses = {mark.name for mark in item.iter_markers()}, config.getoption("rehearse", False)
    if rehearses or "rehearsal" in marks:
        return rehearses and "rehearsal" in marks
    if "gpu" in marks and not torch.cuda.is_available():
        return False
    return "extra" not in marks or config.getoption("--all-cases")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases that are not wanted."""
    wanted = [is_wanted(item, config) for item in items]
    config.hook.pytest_deselected(items=[item for item, kept in zip(items, wanted, strict=True) if not kept])
    items[:] = [item for item, kept in zip(items, wanted, strict=True) if kept]


def wanted_providers(names: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """The known ones of ``names``, and a line about each of the others."""
    unknown = [f"provider {name} is unknown and left out; there are {', '.join(PROVIDERS)}" for name in names]
    known = tuple(name for name in names if name in PROVIDERS)
    return known, [line for name, line in zip(names, unknown, strict=True) if name not in PROVIDERS]


def pytest_report_header(config: pytest.Config) -> list[str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none, so the GPU cases are left out"
    return [
        f"machine: {floors.this_machine()}, torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})",
        f"threads: {torch.get_num_threads()}; allocator: {ALLOCATOR}",
        f"CUDA device: {gpu}",
        *([f"not installed: {', '.join(absent)} ({tables.PEERS})"] if (absent := engines.missing()) else []),
        *wanted_providers(config.getoption("--provider"))[1],
    ]


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    """Settings of the benchmark run, from the command line, and the machine's description for every row."""
    import den_kernels

    wanted = wanted_providers(request.config.getoption("--provider"))[0]
    return Settings(
        seconds=request.config.getoption("--case-seconds"),
        least_rounds=3 if request.config.getoption("rehearse", False) else Settings.least_rounds,
        compile=request.config.getoption("--dense-compile"),
        autotune=request.config.getoption("--autotune"),
        providers=wanted,
        engines=tuple(name for name in engines.installed() if not wanted or name in wanted),
        environment={
            "machine": floors.this_machine(),
            "processor": floors.processor_name(),
            "threads": torch.get_num_threads(),
            "allocator": ALLOCATOR,
            "versions": {
                "den_kernels": den_kernels.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                **engines.versions(),
            },
            "not_installed": engines.missing(),
        },
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Our own table of the cases that ran: pytest-benchmark's shows only our times."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    rows = [bench.extra_info for bench in getattr(session, "benchmarks", []) if "case" in bench.extra_info]
    if rows:
        terminalreporter.section("against the others")
        parts = [tables.cases_table(rows), tables.memory_table(rows), tables.losses_table(rows)]
        parts.append(tables.contention_table(rows))
        terminalreporter.write_line("\n\n".join(text for text in parts if text.count("\n") > 1))
