"""compute-sanitizer and ncu as checks of tests/gpu, and that the cases of these checks reach the kernels."""

from itertools import accumulate

import pytest
import torch

from benchmarks import rehearsal
from benchmarks.gpu_ways import Unavailable
from den_kernels._cuda_layout import FusedArguments, fused_layout
from tests import gpu_blocks, on_gpu, sanitized
from tests.gpu import test_profiler, test_sanitizer
from tests.on_gpu import BATCH, Context

CHIPS = {"A100": (108, 163 << 10), "H100": (132, 227 << 10), "B200": (148, 227 << 10)}
CPU, TINY = Context("cpu"), Context("cpu", tiny=True)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("block", sanitized.BLOCKS, ids=str)
def test_every_block_reaches_the_fused_kernel(block, itemsize, chip):
    widths = tuple(accumulate(block.groups))
    arguments = FusedArguments(
        BATCH, *block.size, block.C, block.C_out, widths, block.stride, itemsize, *CHIPS[chip]
    )  # fmt: skip
    assert fused_layout(arguments) is not None


@pytest.mark.parametrize("chip", CHIPS)
def test_the_checks_of_values_and_graphs_reach_it_too(chip):
    (conv1, *_), x, _ = gpu_blocks.block_case("bfloat16", 1, "levels", CPU)
    block, other, _ = gpu_blocks.plain_case(CPU)
    for conv, images in ((conv1, x), (block.conv1, other)):
        B, C, H, W = images.shape
        widths = tuple(accumulate(conv.out_groups))
        assert fused_layout(FusedArguments(B, H, W, C, C, widths, 1, 2, *CHIPS[chip])) is not None


def test_blocks_run_in_their_shapes_without_the_kernel(monkeypatch):
    calls = []
    monkeypatch.setattr(sanitized._cuda, "layout_of", lambda *_: "a layout")
    monkeypatch.setattr(sanitized._cuda, "fused_residual", lambda x, out, *_, **keywords: calls.append((x, out)))
    for block in sanitized.BLOCKS:
        assert sanitized.run_block(block, "bfloat16", torch.device("cpu"))
        x, out = calls.pop()
        assert (out is x) == block.in_place
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert out.shape[1] == block.C_out


def test_where_a_kernel_is_left_out_it_is_no_success(capsys):
    assert sanitized.main(torch.device("cpu")) == 1
    assert capsys.readouterr().out == f"kernels ran: 4 plans, 0 of {3 * len(sanitized.BLOCKS)} blocks\n"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """tool(name, text, status): a program of that name that prints a text."""

    def make(name: str, text: str, status: int) -> None:
        (tmp_path / "output").write_text(text)
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\ncat "{tmp_path}/output"\nexit {status}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    monkeypatch.setattr(Context, "is_cuda", True)
    return make


def outcome(check, name: str) -> tuple[str, str]:
    try:
        return "ok", str(check(name, TINY))
    except AssertionError as error:
        return "failed", str(error)
    except Unavailable as reason:
        return "skipped", str(reason)


@pytest.mark.parametrize(
    ("text", "code", "status", "words"),
    [
        ("kernels ran: 4 plans\n========= ERROR SUMMARY: 0 errors\n", 0, "ok", "0 errors"),
        ("========= Invalid __global__ read\nERROR SUMMARY: 1 error\n", 9, "failed", "Invalid __glob"),
        ("========= ERROR SUMMARY: 0 errors\n", 0, "failed", "the kernels did not run"),
        ("========= Device not supported\n", 1, "skipped", "compute-sanitizer: Device not supported"),
        ("========= Target application returned an error\n", 1, "failed", "ended with 1"),
        ("========= Device not supported\n", 0, "failed", "the kernels did not run"),
    ],
)
def test_what_the_sanitizer_says_counts(text, code, status, words, tool):
    tool("compute-sanitizer", text, code)
    got, said = outcome(test_sanitizer.sanitize, "memcheck")
    assert got == status
    assert words in said


def table(launches: int) -> str:
    units, values = zip(*rehearsal.METRICS.values(), strict=True)
    lines = [list(rehearsal.METRICS), units, *[values] * launches]
    return "==PROF== Connected\n" + "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines) + "\n"


@pytest.mark.parametrize(
    ("text", "code", "status", "words"),
    [
        (table(2), 0, "ok", "conv2"),
        (table(1), 0, "failed", "ncu saw 1 launches"),
        ("==WARNING== No kernels were profiled.\n", 0, "failed", "ncu saw 0 launches"),
        ("==ERROR== ERR_NVGPUCTRPERM - no permission\n", 1, "skipped", "ERR_NVGPUCTRPERM"),
        ("==ERROR== Failed to find metric\n", 1, "failed", "ended with 1"),
        ("left out: the Triton kernels do not run here\n", 0, "skipped", "do not run here"),
    ],
)
def test_what_ncu_says_counts(text, code, status, words, tool):
    tool("ncu", text, code)
    got, said = outcome(test_profiler.profile, "composition 64x32x32")
    assert got == status
    assert words in said


def test_what_ncu_measures_is_kept_by_launch(tool):
    tool("ncu", table(2), 0)
    launches = test_profiler.profile("composition 64x32x32", TINY)["launches"]
    assert [launch["part"] for launch in launches] == ["conv1", "conv2"]
    assert set(launches[0]) == {"kernel", "part", *test_profiler.KEPT} - {"memory"}


@pytest.mark.parametrize(
    ("name", "check"), [("ncu", test_profiler.profile), ("compute-sanitizer", test_sanitizer.sanitize)]
)
def test_without_the_tool_or_a_gpu_it_is_skipped(name, check, monkeypatch):
    assert outcome(check, "fused 64x32x32") == ("skipped", "a CUDA device is needed")
    monkeypatch.setattr(Context, "is_cuda", True)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(on_gpu, "PLACES", ())
    assert outcome(check, "fused 64x32x32") == ("skipped", f"{name} is not installed")
