"""Options, markers, machine settings and the closing table of ``pytest benchmarks/``."""

from __future__ import annotations

import os
import platform
from typing import Any

import pytest
import torch

from . import floors, report
from .harness import Settings

MARKERS = {
    "op": "one operator or block",
    "residual": "the inference residual block",
    "conv": "the dynamic convolution",
    "network": "a whole network, selector included",
    "memory": "peak memory",
}
# At import, before torch has made a tensor that matters.
ALLOCATOR = floors.keep_allocations_on_the_heap()
THREADS = min(2, os.cpu_count() or 1)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("den_kernels benchmarks")
    group.addoption("--case-seconds", type=float, default=1.0, help="time to spend on the rounds of a case")
    group.addoption(
        "--dense-compile",
        choices=("none", "network", "all"),
        default="network",
        help="where the dense side is also run through torch.compile (compilation takes a minute or so a network)",
    )


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    torch.set_num_threads(THREADS)


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [
        f"machine: {floors.this_machine()}, torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})",
        f"threads: {torch.get_num_threads()}; allocator: {ALLOCATOR}",
    ]


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    """How long a case may take, and what every row says of the machine."""
    import den_kernels

    return Settings(
        seconds=request.config.getoption("--case-seconds"),
        compile=request.config.getoption("--dense-compile"),
        environment={
            "machine": floors.this_machine(),
            "processor": floors.processor_name(),
            "threads": torch.get_num_threads(),
            "allocator": ALLOCATOR,
            "versions": {
                "den_kernels": den_kernels.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        },
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Our own table of the cases that ran: pytest-benchmark's shows only our times."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    rows = [bench.extra_info for bench in getattr(session, "benchmarks", []) if "case" in bench.extra_info]
    if rows:
        terminalreporter.section("against the others")
        tables = [report.cases_table(rows), report.memory_table(rows)]
        terminalreporter.write_line("\n\n".join(text for text in tables if text.count("\n") > 1))
