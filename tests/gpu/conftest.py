"""Checks that need a GPU: skipped, with the reason, where there is none; rehearsed on a simulated one.

`python -m benchmarks.gpu_check` runs them with a budget and keeps what they record; `--rehearse` is an option of its
plugin (benchmarks/gpu_rows.py).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_ways import Unavailable
from tests.on_gpu import Context

FOLDER = Path(__file__).parent
NEEDED = "needs a CUDA device of capability 8.0 or newer"


def reason_to_skip() -> str | None:
    """Why the kernels cannot run on this machine's GPU; None where they can."""
    if not torch.cuda.is_available():
        return f"{NEEDED}: none here"
    capability = torch.cuda.get_device_capability()
    found = f"{torch.cuda.get_device_name()} has {'.'.join(map(str, capability))}"
    return None if capability >= (8, 0) else f"{NEEDED}: {found}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reason = None if config.getoption("rehearse", False) else reason_to_skip()
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A tool or a kernel that is not here is a skip."""
    try:
        return (yield)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def context(request: pytest.FixtureRequest) -> Context:
    """The GPU; in a rehearsal the simulated one and sizes for an interpreter."""
    rehearses = request.config.getoption("rehearse", False)
    on_cpu = rehearses and request.node.get_closest_marker("traced") is not None
    return Context("cpu" if on_cpu else "cuda:0", tiny=rehearses)


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Not here: `numerics` poisons what is compared; graphs, compilation and tools run as users run them."""


@pytest.fixture
def record(record_property: Callable[[str, Any], None]) -> Callable[[dict[str, Any]], None]:
    """Keeps what a check measured, for the results file."""

    def each(measured: dict[str, Any]) -> None:
        for name, value in measured.items():
            record_property(name, value)

    return each
