"""compute-sanitizer as a step of `benchmarks.gpu_check`, and that its problems and the checks' reach the kernels."""

import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks import gpu_blocks, gpu_check, gpu_proofs, gpu_sanitize, gpu_worker  # noqa: E402
from benchmarks.gpu_worker import BATCH, Context, Unavailable, outcome  # noqa: E402
from den_kernels._cuda_layout import FusedProblem, fused_layout  # noqa: E402

CHIPS = {"A100": (108, 163 << 10), "H100": (132, 227 << 10), "B200": (148, 227 << 10)}
CPU = Context("cpu")  # of full size


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("block", gpu_sanitize.BLOCKS, ids=str)
def test_every_block_reaches_the_fused_kernel(block, itemsize, chip):
    widths = tuple(accumulate(block.groups))
    problem = FusedProblem(
        BATCH, *block.size, block.C, block.C_out, widths, block.stride, itemsize, *CHIPS[chip]
    )  # fmt: skip
    assert fused_layout(problem) is not None


@pytest.mark.parametrize("chip", CHIPS)
def test_the_checks_of_values_and_graphs_reach_it_too(chip):
    (conv1, *_), x, _ = gpu_blocks.block_problem("bfloat16", 1, "levels", CPU)
    block, other, _ = gpu_proofs.problem(CPU)
    for conv, images in ((conv1, x), (block.conv1, other)):
        B, C, H, W = images.shape
        widths = tuple(accumulate(conv.out_groups))
        assert fused_layout(FusedProblem(B, H, W, C, C, widths, 1, 2, *CHIPS[chip])) is not None


def test_blocks_run_in_their_shapes_without_the_kernel(monkeypatch):
    calls = []
    monkeypatch.setattr(gpu_sanitize._cuda, "layout_of", lambda *_: "a layout")
    monkeypatch.setattr(gpu_sanitize._cuda, "fused_residual", lambda x, out, *_, **keywords: calls.append((x, out)))
    for block in gpu_sanitize.BLOCKS:
        assert gpu_sanitize.run_block(block, "bfloat16", torch.device("cpu"))
        x, out = calls.pop()
        assert (out is x) == block.in_place
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert out.shape[1] == block.C_out


def test_where_a_kernel_is_left_out_it_is_no_success(capsys):
    assert gpu_sanitize.main(torch.device("cpu")) == 1
    assert capsys.readouterr().out == f"kernels ran: 4 plans, 0 of {3 * len(gpu_sanitize.BLOCKS)} blocks\n"


TOOL = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
{body}
"""


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("echo 'kernels ran: 4 plans'; echo '========= ERROR SUMMARY: 0 errors'", "ok", "0 errors"),
        ("echo '========= Invalid __global__ read'; echo 'ERROR SUMMARY: 1 error'; exit 9", "failed", "Invalid __glob"),
        ("echo '========= ERROR SUMMARY: 0 errors'", "failed", "the kernels did not run"),
        ("echo '========= Device not supported'; exit 1", "skipped", "compute-sanitizer: Device not supported"),
        ("echo '========= Target application returned an error'; exit 1", "failed", "ended with 1"),
        ("echo '========= Device not supported'", "failed", "the kernels did not run"),
    ],
)
def test_what_the_tool_says_counts(body, status, words, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL.format(body=body))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(Context, "is_cuda", True)
    monkeypatch.setattr("benchmarks.gpu_worker.synchronize", lambda context: None)
    row = outcome(gpu_sanitize.checks(CPU)[0], CPU)
    assert row["status"] == status
    assert words in row[{"ok": "summary", "failed": "error", "skipped": "reason"}[status]]


def test_without_the_tool_or_a_gpu_it_is_skipped(monkeypatch):
    with pytest.raises(Unavailable, match="a CUDA device is needed"):
        gpu_sanitize.sanitize("memcheck", CPU)
    assert "sanitize" in gpu_check.STEPS
    monkeypatch.setattr(Context, "is_cuda", True)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gpu_worker, "PLACES", ())
    with pytest.raises(Unavailable, match="compute-sanitizer is not installed"):
        gpu_sanitize.sanitize("memcheck", CPU)


def test_the_check_needs_nothing_but_torch_and_numpy():
    """So that it runs on a machine where nothing can be installed."""
    import subprocess

    program = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in NAMES:
            raise ModuleNotFoundError(f"no module named {name}", name=name)
NAMES = {"tyro", "safetensors", "tqdm", "PIL", "matplotlib", "sklearn", "pooch", "tensorboard", "pytest", "pybind11",
         "hypothesis", "pytest_benchmark", "ray", "scipy"}
sys.meta_path.insert(0, Absent())
from benchmarks import gpu_check
context = gpu_check.Context("cpu", tiny=True)
print(sum(len(step.checks(context)) for step in gpu_check.STEPS.values()))
"""
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r})" + program],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50
