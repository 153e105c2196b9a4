"""`benchmarks.gpu_check` from end to end without a GPU: what runs first, what stops the rest, and the rehearsal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks import gpu_check, gpu_composition, gpu_machine, gpu_pool, gpu_profile, gpu_worker, rehearsal  # noqa: E402
from benchmarks.gpu_worker import Context, Unavailable, outcome  # noqa: E402

CPU = Context("cpu", tiny=True)


def rehearse(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--rehearse", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_the_rehearsal_runs_everything_and_keeps_nothing(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    tables = ROOT / "den_kernels" / "_triton" / "tables"
    before = sorted(gpu_check.RESULTS.iterdir()), sorted(tables.glob("*"))
    done = rehearse("--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (sorted(gpu_check.RESULTS.iterdir()), sorted(tables.glob("*"))) == before
    document = json.loads((tmp_path / "rehearsal.json").read_text())
    assert set(document["steps"]) == {*gpu_check.STEPS, "tune"}
    rows = {row["case"]: row for step in document["steps"].values() for row in step["cases"]}
    skipped = {name: row["reason"] for name, row in rows.items() if row["status"] == "skipped"}
    assert all(name.startswith("fused") and name.endswith("float32") for name in skipped), skipped
    assert all("computed" in row for row in rows.values() if row["status"] == "ok")
    for name in ("smoke: convolution, forward and backward", "smoke: composition", "composition mask/float16"):
        assert "launches interpreted" in rows[name]["computed"]
    assert rows["profile composition 64x32x32"]["launches"][-1]["part"] == "conv2"
    assert rows["sanitize memcheck"]["summary"].startswith("========= ERROR SUMMARY: 0 errors")


@pytest.mark.parametrize("folder", [gpu_check.RESULTS, gpu_check.RESULTS / "below"])
def test_a_rehearsal_never_writes_among_the_measured(folder):
    done = rehearse("--out", str(folder))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--out must be outside" in done.stderr


@pytest.fixture
def ran(monkeypatch):
    """Steps as they begin; their checks do not run, and have the status that is asked for."""
    steps: dict[str, float] = {}
    statuses: dict[str, dict] = {}

    def run(step, names, context, limit, stall, workers=1):
        assert stall >= 180 or step == "tune"
        steps[step] = limit
        return [{"case": name, "seconds": 0.0} | statuses.get(step, {"status": "ok"}) for name in names]

    monkeypatch.setattr(gpu_pool, "run", run)
    return steps, statuses


def run_command(folder: Path, *arguments: str) -> int:
    return gpu_check.main(["--device", "cpu", "--tiny", "--out", str(folder), *arguments])


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
    assert run_command(tmp_path, "--tune", "5") == 1
    assert list(steps) == ["build", "smoke"]
    text = capsys.readouterr().out
    assert "nothing else runs" in text
    assert "FAILED smoke: plan" in text


def test_the_smoke_comes_first_whatever_is_asked_for(ran, tmp_path):
    steps, statuses = ran
    statuses["smoke"] = {"status": "skipped", "reason": "the fused kernel does not take this block here"}
    assert run_command(tmp_path, "--only", "proofs", "correctness", "--tune", "5") == 0
    assert list(steps) == ["build", "smoke", "tune", "correctness", "proofs"]
    assert steps["smoke"] == 60
    assert all(limit >= 180 for step, limit in steps.items() if step not in ("smoke", "tune"))


def test_processes_that_start_after_the_build_report_the_machine():
    assert [check.name for check in gpu_check.STEPS["build"].checks(CPU)] == ["extension"]
    names = [check.name for step in list(gpu_check.STEPS)[2:] for check in gpu_check.STEPS[step].checks(CPU)]
    assert "machine" in names
    assert "extension" not in names


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
    monkeypatch.setattr("den_kernels._extension.extension", None)
    monkeypatch.setattr(Context, "is_cuda", True)
    monkeypatch.setattr(gpu_worker, "synchronize", lambda context: None)
    done = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(gpu_machine.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(gpu_machine, "answer", lambda *_: says)
    row = outcome(gpu_machine.build_checks(CPU)[0], CPU)
    assert row["status"] == status, row


def test_what_a_new_process_says_of_the_extension():
    assert gpu_machine.answer(sys.executable, "-c", gpu_machine.LOADED) is not None


def broken(call, fault):
    """A call whose third result is spoilt."""
    count = 0

    def spoilt(*arguments):
        nonlocal count
        count += 1
        return fault(call(*arguments), count)

    return spoilt


def flip(y: torch.Tensor, count: int) -> torch.Tensor:
    if count == 3:
        y[2, 0, 0, 0] += 1e-6
    return y


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (flip, r"calls \[2\] give other bits"),
        (lambda y, count: y.roll(1, 3), "must be its shortcut|errs by"),
        (lambda y, count: torch.where(y.isfinite(), y * 1.02, y), "must be its shortcut|errs by"),
        (lambda y, count: y + y.new_tensor(float("nan")), "NaN|other bits"),
    ],
)
def test_a_composition_that_is_wrong_or_not_the_same_twice_is_found_out(fault, words, monkeypatch):
    call = gpu_composition.dynamic_residual
    assert gpu_composition.check_composition("mask", "tf32", CPU)["calls"] == 3
    monkeypatch.setattr(gpu_composition, "dynamic_residual", broken(call, fault))
    with pytest.raises(AssertionError, match=words):
        gpu_composition.check_composition("mask", "tf32", CPU)


def test_the_composition_is_compared_under_load():
    """256 images of 64 channels on 32 x 32, 20 calls, in every type."""
    sizes = Context("cpu")
    assert (sizes.size(256, 3), sizes.size(gpu_composition.CALLS, 3)) == (256, 20)
    names = {check.name for check in gpu_composition.checks(sizes)}
    assert {f"composition levels/{way}" for way in ("bfloat16", "float16", "tf32")} <= names
    assert names <= {check.name for check in gpu_check.correctness(sizes)}


def table(launches: int) -> str:
    units, values = zip(*rehearsal.METRICS.values(), strict=True)
    lines = [list(rehearsal.METRICS), units, *[values] * launches]
    return "==PROF== Connected\n" + "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines) + "\n"


@pytest.mark.parametrize(
    ("text", "code", "status", "words"),
    [
        (table(2), 0, "ok", ""),
        (table(1), 0, "failed", "ncu saw 1 launches"),
        ("==WARNING== No kernels were profiled.\n", 0, "failed", "ncu saw 0 launches"),
        ("==ERROR== ERR_NVGPUCTRPERM - no permission\n", 1, "skipped", "ERR_NVGPUCTRPERM"),
        ("==ERROR== Failed to find metric\n", 1, "failed", "ended with 1"),
        ("left out: the Triton kernels do not run here\n", 0, "skipped", "do not run here"),
    ],
)
def test_what_ncu_says_counts(text, code, status, words, monkeypatch, tmp_path):
    (tmp_path / "output").write_text(text)
    tool = tmp_path / "ncu"
    tool.write_text(f'#!/bin/sh\ncat "{tmp_path}/output"\nexit {code}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(Context, "is_cuda", True)
    monkeypatch.setattr(gpu_worker, "synchronize", lambda context: None)
    row = outcome(gpu_profile.checks(CPU)[-1], CPU)
    assert row["status"] == status, row
    assert words in row.get("error", row.get("reason", ""))
    if status == "ok":
        assert [launch["part"] for launch in row["launches"]] == ["conv1", "conv2"]
        assert set(row["launches"][0]) == {"kernel", "part", *gpu_profile.KEPT} - {"memory"}


def test_without_ncu_it_is_skipped(monkeypatch):
    monkeypatch.setattr(Context, "is_cuda", True)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gpu_worker, "PLACES", ())
    with pytest.raises(Unavailable, match="ncu is not installed"):
        gpu_profile.profile("fused 64x32x32", CPU)
