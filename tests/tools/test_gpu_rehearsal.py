"""`python -m benchmarks.gpu_check --rehearse` from end to end, on a simulated GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check

ROOT = Path(__file__).resolve().parents[2]


def rehearse(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--rehearse", "--budget", "1500", *arguments]
    environment = gpu_check.environment()
    for name in [name for name in environment if name.startswith("PYTEST_XDIST")]:
        del environment[name]  # else pytest, in a process of its own, takes itself for a worker of xdist
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1700)


@pytest.mark.release
def test_the_rehearsal_runs_everything_and_keeps_nothing(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    tables = ROOT / "den_kernels" / "_triton" / "tables"
    before = sorted(gpu_check.RESULTS.iterdir()), sorted(tables.glob("*"))
    done = rehearse("--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    assert (sorted(gpu_check.RESULTS.iterdir()), sorted(tables.glob("*"))) == before
    document = json.loads((tmp_path / "rehearsal.json").read_text())
    assert set(document["gpu"]["steps"]) == {"build", "machine", "tune", *gpu_check.STEPS}
    assert set(document["gpu"]["rates"]) == {"bfloat16", "float16", "tf32", "copy"}
    checks = {row["check"]: row for row in document["gpu"]["checks"]}
    skipped = {name: row["reason"] for name, row in checks.items() if row["status"] == "skipped"}
    assert all(name.startswith("test_blocks.py::test_fused_residual[float32") for name in skipped), skipped
    for name in (
        "test_convolution.py::test_convolution_first", "test_composition.py::test_composition_first",
        "test_composition.py::test_composition[float16-mask]", "test_graphs.py::test_mask_graph",
        "test_blocks.py::test_norm[bfloat16-levels-plain]",
    ):  # fmt: skip
        assert "launches interpreted" in checks[name]["computed"]
    profiled = checks["test_profiler.py::test_profile[composition 64x32x32]"]
    assert profiled["launches"][-1]["part"] == "conv2"
    sanitized = checks["test_sanitizer.py::test_sanitizer[memcheck]"]
    assert sanitized["summary"].startswith("========= ERROR SUMMARY: 0 errors")
    rows = {row["case"]: row for row in document["rows"]}
    assert {name.split("/")[0] for name in rows} == {
        "conv-out-elastic", "conv-in-elastic", "residual", "plan", "network", "training-estimator",
    }  # fmt: skip
    block = rows["residual/16x6x6/B8/uniform/bfloat16/cuda"]
    assert {"ours-composed", "ours-fused", "ours-inplace", "dense-compiled"} <= set(block["providers"])
    assert all(provider["graph"] for provider in block["providers"].values())
    assert "residual/16-32x6x6/2/B8/full/bfloat16/cuda max-autotune" in rows
    assert (tmp_path / "tables").is_dir() == any((tmp_path / "tuned").glob("sm_*.json"))


@pytest.mark.parametrize("folder", [gpu_check.RESULTS, gpu_check.RESULTS / "below"])
def test_a_rehearsal_never_writes_among_the_measured(folder, capsys):
    assert gpu_check.main(["--rehearse", "--out", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--out must be outside" in error
