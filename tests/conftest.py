"""Every test is seeded, sees poisoned uninitialised memory, and starts Python processes that import what it imports."""

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import den_kernels
from den_kernels.float32 import allows_tf32

# Workers side by side (pytest -n) share the cores: torch's threads would otherwise spin against each other.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))

# The helpers of tests/ and benchmarks/; at the end, so that an installed den stays the one tested.
sys.path.append(str(Path(__file__).resolve().parents[1]))
from tests.fuzz import register_profiles

register_profiles()

# A child process must not pick up the source tree from its working directory when the installed package is under test.
os.environ["PYTHONSAFEPATH"] = "1"
os.environ["PYTHONPATH"] = str(Path(den_kernels.__file__).parents[1])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-launch", action="store_true", help="machine code of every network in every dtype")
    parser.addoption("--release", action="store_true", help="also the tests that run before a release only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unasked = [name for name in ("every_launch", "release") if not config.getoption(f"--{name.replace('_', '-')}")]
    left_out = [item for item in items if any(map(item.get_closest_marker, unasked))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries under test draw from the global generator)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, or the largest integer, so a result that was never written cannot pass."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def threads_unchanged() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say whose machine code was looked at."""
    reports = [report for status in ("passed", "failed") for report in terminalreporter.getreports(status)]
    if any("test_machine_code" in report.nodeid for report in reports):
        terminalreporter.write_line(f"machine code: Triton {version('triton')}")


@pytest.fixture(autouse=True)
def float32_as_before() -> Iterator[None]:
    """The settings of float32 products are given back; the older `allow_tf32` can be read: torch refuses mixtures."""
    cudnn: Any = torch.backends.cudnn
    settings = (torch.backends, cudnn, cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    before, allowed = [setting.fp32_precision for setting in settings], allows_tf32()
    yield
    if [setting.fp32_precision for setting in settings] != before:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
        cudnn.allow_tf32 = allowed


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """den_kernels as it is where the extension was not built."""
    for name, module in list(sys.modules.items()):
        if name.startswith("den_kernels.") and getattr(module, "extension", None) is not None:
            monkeypatch.setattr(module, "extension", None)


@pytest.fixture
def stored_run() -> Callable[..., Any]:
    """stored_run(folder, mode, seed, **settings): a run folder as `den train` leaves it, of an untrained network for
    digits whose selector tells images apart."""

    from den import create_model  # here: the checks of tests/gpu run where training has not what it needs
    from den.data import load_set
    from den.support.settings import to_dict
    from den.train.checkpoint import prefixed, save_checkpoint
    from den.train.config import DataConfig, NetworkConfig, TrainConfig

    def store(folder: Path, mode: str = "den", seed: int = 0, **settings: object) -> TrainConfig:
        folder.mkdir(parents=True)
        data, network = DataConfig(tasks=("digits",)), NetworkConfig("wrn8_1", trunk_size=8)
        config = TrainConfig(out=folder, mode=mode, seed=seed, data=data, network=network, progress=False, **settings)
        torch.manual_seed(seed)
        model = create_model("wrn8_1", [load_set("digits", "test").task], trunk_size=8)
        torch.nn.init.normal_(model.selector.heads[0].weight)
        record = {"model": model.config.to_dict(), "position": {"total_steps": 5}}
        for name in ("last", "best"):
            save_checkpoint(folder / f"{name}.safetensors", prefixed("model", model.state_dict()), record)
        (folder / "config.json").write_text(json.dumps(to_dict(config)))
        return config

    return store
