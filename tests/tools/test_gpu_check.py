"""`benchmarks.gpu_check` without a GPU: checks that die, hang or do not fit, what is kept, what it needs."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_check, gpu_machine, gpu_results, gpu_rows
from benchmarks.gpu_check import Step
from benchmarks.gpu_results import GpuResults
from benchmarks.parameters import checked
from benchmarks.targets import AUTOTUNED, GPU_TARGETS

ROOT = Path(__file__).resolve().parents[2]
SOURCE = {"commit": "0123", "modified": False, "measured": "2026-01-02T03:04:05", "machine": "gpu"}
CHECKS = """
import os, signal, time
import pytest
from benchmarks import gpu_rows

def test_fine(record_property): record_property("value", {"one": 1})
def test_wrong(): assert 1 == 2, "wrong value"
def test_dies(): os._exit(9)
def test_breaks(monkeypatch):
    gpu_rows.is_dead = lambda: True
    raise RuntimeError("CUDA error: an illegal memory access")
def test_missing(): pytest.skip("not here")
def test_hangs(): time.sleep(600)
def test_stops(): os.killpg(0, signal.SIGKILL)
def test_fine_too(): pass
"""


@pytest.fixture
def step(tmp_path, monkeypatch):
    """step(names, seconds, workers): what these of the checks above come to, by name."""

    def run(names: str, seconds: float = 600, workers: int = 0, text: str = CHECKS) -> dict[str, dict]:
        (tmp_path / "test_it.py").write_text(text)
        monkeypatch.setitem(gpu_check.STEPS, "it", Step(str(tmp_path), "", workers=workers))
        select = " or ".join(f"test_{name}" for name in names.split())
        rows = gpu_check.run_step("it", seconds, argparse.Namespace(select=select, rehearse=False))
        return {row["check"].rpartition("::test_")[2]: row for row in rows}

    return run


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.release), 1])
def test_nothing_that_a_check_does_loses_the_others(workers, step):
    rows = step("fine wrong dies breaks missing", workers=workers)
    statuses = {name: row["status"] for name, row in rows.items()}
    assert statuses == {
        "fine": "ok", "wrong": "failed", "dies": "failed", "breaks": "failed", "missing": "skipped", "fine_too": "ok",
    }  # fmt: skip
    assert rows["fine"]["value"] == {"one": 1}
    assert "wrong value" in rows["wrong"]["error"]
    assert rows["wrong"]["where"] == ["test_it.py:7"]
    assert "the process ended" in rows["dies"]["error"]
    assert "illegal memory access" in rows["breaks"]["error"]
    assert rows["missing"]["reason"] == "not here"


def test_a_hanging_check_is_ended_and_the_rest_runs(step, monkeypatch):
    monkeypatch.setattr(gpu_check, "CHECK", 2)
    rows = step("hangs fine_too")
    assert "the process ended with status 1" in rows["hangs"]["error"]
    assert rows["fine_too"]["status"] == "ok"


def test_what_does_not_fit_the_time_is_skipped(step, monkeypatch):
    stream, clock = gpu_check.stream, [0.0]

    def out_of_time(command, seconds):
        ended, clock[0] = stream(command, 600), 1e6
        return ended

    monkeypatch.setattr(gpu_check, "stream", out_of_time)
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time))
    rows = step("fine stops fine_too")
    assert rows["fine"]["status"] == "ok"
    assert rows["stops"]["reason"] == "out of time while it ran"
    assert rows["fine_too"]["reason"] == "out of time"
    assert step("fine", seconds=0)["it"]["reason"] == "out of time"


def test_a_program_is_killed_when_its_time_is_over():
    status, _ = gpu_check.stream([sys.executable, "-c", "import time; time.sleep(600)"], 0.5)
    assert status == -9


def test_checks_that_cannot_be_collected_fail_once(step):
    assert "No module named 'nowhere'" in step("fine", text="import nowhere")["it"]["error"]


def test_no_check_may_take_more_than_three_minutes(tmp_path):
    options = argparse.Namespace(select=None, rehearse=False)
    for step in gpu_check.STEPS.values():
        command = gpu_check.pytest_command(step, tmp_path, 0, options)
        assert {"faulthandler_timeout=180", "faulthandler_exit_on_timeout=true"} <= set(command)


def test_the_smoke_is_whole_whatever_is_selected(tmp_path):
    options = argparse.Namespace(select="conv", rehearse=False)
    commands = {name: gpu_check.pytest_command(step, tmp_path, 0, options) for name, step in gpu_check.STEPS.items()}
    assert [name for name, command in commands.items() if "-k" not in command] == ["smoke"]
    assert "(conv)" in commands["times"]


def test_a_line_cut_off_is_left_out(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"begin": "a"}\n{"check": "a", "stat')
    assert gpu_rows.read(file) == [{"begin": "a"}]


def timed_row(case: str, **providers: float) -> dict:
    made = {
        name.replace("_", "-"): {
            "role": "ours", "median": seconds, "floor_share": 0.5, "dense_share": seconds, "realised": 1 / seconds / 2,
        }
        for name, seconds in providers.items()
    }  # fmt: skip
    return {"check": case, "case": case, "status": "ok", "seconds": 1.0, "providers": made}


def block(shape: str, mix: str) -> str:
    return f"residual/{shape}/B256/{mix}/bfloat16/cuda"


def test_targets_beside_what_was_measured():
    plan = "plan/20-blocks/B1024/random-blocks/int64/cuda"
    made = [
        timed_row(plan, ours=9e-6),
        timed_row(block("256x8x8", "uniform"), ours_inplace=0.6),
        timed_row(block("256x8x8", "zero"), ours_inplace=0.04),
        timed_row(block("256x8x8", "full"), ours_fused=0.5, ours_composed=0.6),
        timed_row(block("256x8x8", "uniform") + AUTOTUNED, ours_inplace=0.8),  # the faster dense side counts
    ]
    values = {target.what: (target.value({row["case"]: row for row in made}), target) for target in GPU_TARGETS}
    assert values["plan of 20 blocks for 1,024 instances"][0] == 9e-6
    zero, target = values["block 256x8x8, all at level 0"]
    assert not target.is_met(zero)
    assert values["block 256x8x8, uniform mix"][0] == pytest.approx(0.5 / 0.8)
    against = values["block 256x8x8, full level, fused kernel against launches of Triton"][0]
    assert against == pytest.approx(1.2)
    assert values["WRN-32-4, uniform mix"][0] is None


def cases_that_are_timed() -> set[str]:
    from benchmarks import (
        test_bench_conv,
        test_bench_network,
        test_bench_plan,
        test_bench_residual,
        test_bench_training,
    )

    modules = (test_bench_conv, test_bench_network, test_bench_plan, test_bench_residual, test_bench_training)
    return {parameter.id for module in modules for parameter in checked(module.GPU, [])}


def test_every_target_is_a_case_that_is_timed():
    timed = cases_that_are_timed()
    assert {target.case for target in GPU_TARGETS} <= timed
    assert len(timed) > 120


def test_report_says_the_important_last(tmp_path):
    found = GpuResults(tmp_path / "gpu.json", "GPU")
    rows = [
        timed_row("plan/20-blocks/B1024/random-blocks/int64/cuda", ours=9e-6),
        {"check": "b", "status": "failed", "error": "E" * 999, "seconds": 0},
        {"check": "c", "status": "skipped", "reason": "time", "seconds": 0},
    ]
    found.put("times", 1.0, rows, SOURCE)
    found.keep()
    skipped, failed, _, last = found.report().splitlines()[-4:]
    assert skipped == "skipped c: time"
    assert failed.startswith("FAILED b: EEE")
    assert len(failed) == 400
    assert last.startswith("1 checks passed, 1 failed, 1 skipped; targets: 1 met, 0 not met")
    assert gpu_results.shortened(["a", "b"], 1) == ["a", "... and 1 more"]


def test_results_are_kept_and_steps_and_cases_replaced(tmp_path):
    path, old = tmp_path / "gpu.json", [timed_row("a", ours=1.0), timed_row("b", ours=1.0)]
    found = GpuResults(path, "GPU")
    found.put("times", 1.0, old, SOURCE)
    found.put("checks", 1.0, [{"check": "x", "status": "ok", "seconds": 1.0, "errors": {"y": 1e-9}}], SOURCE)
    found.keep()
    again = GpuResults(path, "GPU")
    again.put("times", 2.0, [timed_row("b", ours=2.0)], SOURCE)
    again.keep()
    document = json.loads(path.read_text())
    assert {row["case"]: row["providers"]["ours"]["median"] for row in document["rows"]} == {"a": 1.0, "b": 2.0}
    assert document["rows"][0]["commit"] == "0123"
    assert [(row["step"], row["check"]) for row in document["gpu"]["checks"]] == [("checks", "x"), ("times", "b")]
    assert document["gpu"]["checks"][0]["errors"] == {"y": 1e-9}
    assert GpuResults(path, "another").rows == GpuResults(path, "GPU", afresh=True).rows == []
    path.write_text("{")
    assert GpuResults(path, "GPU").rows == []


@pytest.fixture
def ran(monkeypatch):
    """Steps as they begin, with their limits; their checks do not run, and have the status that is asked for."""
    steps: dict[str, float] = {}
    statuses: dict[str, dict] = {}

    def run_step(name, seconds, options):
        steps[name] = seconds
        return gpu_check.collect(name, [{"collected": ["it"]}, {"check": "it", "seconds": 0.0, "status": "ok"}
                                        | statuses.get(name, {})])  # fmt: skip

    monkeypatch.setattr(gpu_check, "run_step", run_step)
    monkeypatch.setattr(gpu_check, "machine", lambda options: {"versions": {}, "rates": {"copy": 1e12}})
    monkeypatch.setattr(gpu_check, "tune", lambda options: {"check": "tune", "status": "ok", "seconds": 1.0})
    monkeypatch.setattr(gpu_machine, "build", lambda: {"check": "extension", "status": "ok", "seconds": 1.0})
    return steps, statuses


def run(folder: Path, *arguments: str) -> int:
    return gpu_check.run(gpu_check.parse(["--out", str(folder), *arguments]), "A GPU")


@pytest.mark.parametrize(
    "row",
    [
        {"status": "failed", "error": "wrong"},
        {"status": "skipped", "reason": "out of time"},
        {"status": "skipped", "reason": "out of time while it ran"},
    ],
)
def test_nothing_runs_behind_a_smoke_that_fails_or_hangs(row, ran, tmp_path, capsys):
    steps, statuses = ran
    statuses["smoke"] = row
    assert run(tmp_path, "--tune", "5") == 1
    assert list(steps) == ["smoke"]
    text = capsys.readouterr().out
    assert "nothing else runs" in text
    assert "FAILED it: " in text


def test_the_smoke_comes_first_whatever_is_asked_for(ran, tmp_path):
    steps, statuses = ran
    statuses["smoke"] = {"status": "skipped", "reason": "the fused kernel does not take this block here"}
    assert run(tmp_path, "--only", "times", "checks", "--tune", "5") == 0
    assert list(steps) == ["smoke", "checks", "times"]
    assert steps["smoke"] == 60
    document = json.loads((tmp_path / "a-gpu.json").read_text())
    assert list(document["gpu"]["steps"]) == ["build", "smoke", "machine", "tune", "checks", "times"]
    assert document["gpu"]["rates"] == {"copy": 1e12}


def test_a_failure_is_the_status_and_the_budget_ends_the_rest(ran, tmp_path):
    steps, statuses = ran
    statuses["checks"] = {"status": "failed", "error": "wrong"}
    assert run(tmp_path, "--budget", "200") == 1
    assert list(steps) == list(gpu_check.STEPS)
    assert all(seconds <= 200 for seconds in steps.values())


def test_without_a_gpu_one_clear_line():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == "gpu_check: a CUDA device is needed, torch finds none\n"


@pytest.mark.parametrize(
    ("says", "status"),
    [
        ("cuda True", "ok"),
        ("cuda False", "skipped"),
        ("den_kernels._C cannot be loaded: x", "failed"),
        (None, "failed"),
    ],
)
def test_a_build_counts_only_where_a_new_process_can_load_it(says, status, monkeypatch):
    answers = iter(["cuda False", says])
    monkeypatch.setattr(gpu_machine, "answer", lambda *_: next(answers))
    monkeypatch.setattr(gpu_machine.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "", ""))
    assert gpu_machine.build()["status"] == status


def test_what_a_new_process_says_of_the_extension():
    assert gpu_machine.loaded() in ("cuda True", "cuda False") or "cannot" in gpu_machine.loaded()


def test_a_machine_of_wheels_of_pytest_alone_is_enough():
    """Where nothing can be installed from elsewhere: torch, numpy, pytest with its plugins, hypothesis."""
    program = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in NAMES:
            raise ModuleNotFoundError(f"no module named {name}", name=name)
NAMES = {"tyro", "safetensors", "tqdm", "PIL", "matplotlib", "sklearn", "pooch", "tensorboard", "ray", "scipy"}
sys.meta_path.insert(0, Absent())
import pytest
options = "-p benchmarks.gpu_rows -p benchmarks.rehearsal --rehearse --collect-only -q -p no:cacheprovider".split()
sys.exit(pytest.main(["tests/gpu", "benchmarks", "-m", "gpu", *options]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=gpu_check.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert done.stdout.count("::") > 60
