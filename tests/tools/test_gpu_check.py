"""`benchmarks.gpu_check` without a GPU: on CPU tensors, on a simulated GPU, and with workers that fail."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # at the end: an installed den_kernels stays the one that is tested

from benchmarks import (  # noqa: E402
    gpu_blocks,
    gpu_check,
    gpu_correctness,
    gpu_machine,
    gpu_pool,
    gpu_proofs,
    gpu_table,
    gpu_times,
    gpu_tuning,
    gpu_worker,
)
from benchmarks.gpu_numerics import close_by_instance, moved  # noqa: E402
from benchmarks.gpu_worker import Check, Context, Unavailable, outcome  # noqa: E402
from den_kernels import RoutingPlan, dynamic_conv2d  # noqa: E402
from den_kernels._triton import clock  # noqa: E402
from den_kernels.testing import LAYOUTS, ConvProblem, in_layout  # noqa: E402
from tests.simulated_gpu import Device, simulated  # noqa: E402

TINY = Context("cpu", tiny=True, seconds=0.01, compiles=False, rates={"bfloat16": 1e11, "tf32": 1e11, "copy": 1e10})
GPU = Context("cuda:0", tiny=True, seconds=0.01, rates=TINY.rates)


@pytest.fixture
def gpu(monkeypatch):
    """A simulated GPU, on which generated code and Triton do not run."""
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(gpu_times, "bare_kernel", lambda *_: lambda x: x)
    monkeypatch.setattr(gpu_times, "ways_of_ours", lambda *_: {"composition": lambda *_: None})
    with simulated(monkeypatch):
        yield


def results(step: str, context: Context, leave_out: tuple[str, ...] = ()) -> list[dict]:
    checks = [check for check in gpu_check.STEPS[step].checks(context) if not check.name.startswith(leave_out)]
    rows = [outcome(check, context) for check in checks]
    assert rows
    assert [row for row in rows if row["status"] == "failed"] == []
    return rows


# Tracing of their own: export and opcheck do not take a simulated tensor; on a CPU they run as they are. Triton's own
# launches are in the rehearsal (test_gpu_rehearsal.py).
@pytest.mark.parametrize("step", ["correctness", "proofs", "convolutions", "blocks", "autotuned", "training"])
def test_every_check_on_a_simulated_gpu(step, gpu):
    rows = results(step, GPU, ("export", "opcheck", "composition levels"))
    assert all(row["case"].startswith("fused") for row in rows if row["status"] == "skipped")


def test_times_are_those_of_graphs_on_a_simulated_gpu(gpu):
    (row,) = results("network", GPU)
    assert set(row["providers"]) >= {"dense-eager", "dense-folded", "dense-folded-compiled"}
    uniform = row["providers"]["ours uniform"]
    assert uniform["graph"]
    assert uniform["flops_ratio"] > 1.3
    assert uniform["realised"] == pytest.approx(1 / uniform["flops_ratio"])  # every simulated time is the same
    assert row["providers"]["ours zero"]["floor"] < uniform["floor"] < row["providers"]["ours full"]["floor"]


def test_warming_up_takes_no_time(gpu):
    context = dataclasses.replace(GPU, warm=True)
    row = outcome(gpu_times.block_checks(context)[0], context)
    assert row["warm"]
    assert "providers" not in row


def test_the_clock_of_the_tuner_times_graphs(gpu):
    x = torch.zeros(3, device="cuda:0")
    assert clock.median_seconds(lambda: x.add_(1), torch.device("cuda:0"), times=5) == pytest.approx(0.25e-3 / 5)
    assert x[0].item() == 2 + 5 * 17  # two calls before the capture, five in it, and sixteen replays of them


def test_the_simulated_gpu_sees_what_a_cpu_forgives(gpu):
    x = torch.ones(3, device="cuda:0")
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="synchronizing"), gpu_proofs.waiting_is_an_error(GPU):
        x.sum().item()
    with pytest.raises(RuntimeError, match="capturing"):
        gpu_proofs.Recording(lambda: x.cpu(), GPU)


def test_levels_out_of_range_are_clamped_or_found_where_asked(gpu):
    levels = torch.tensor([[1], [4], [-1]]).to("cuda:0")
    with gpu_proofs.waiting_is_an_error(GPU):
        plan = RoutingPlan.from_levels(levels, 3)
    assert plan.levels.cpu().tolist() == [[1], [3], [0]]
    with pytest.raises(ValueError, match=r"levels must be in 0\.\.3, got 4 for instance 1, block 0"):
        RoutingPlan.from_levels(levels, 3, check=True)
    with pytest.raises(RuntimeError, match="synchronizing"), gpu_proofs.waiting_is_an_error(GPU):
        RoutingPlan.from_levels(levels, 3, check=True)


def test_a_graph_that_keeps_its_first_route_is_found_out(gpu, monkeypatch):
    update = RoutingPlan.update_

    def unless_recording(plan, levels):
        return plan if Device.current.recording is not None else update(plan, levels)

    monkeypatch.setattr(RoutingPlan, "update_", unless_recording)
    row = outcome(Check("graph", gpu_proofs.check_block_graph), GPU)
    assert row["status"] == "failed"
    assert "a replay differs" in row["error"]


@pytest.mark.parametrize("name", ["export", "opcheck: dynamic_conv2d", "opcheck: plan_masks", "opcheck: dynamic_norm"])
def test_tracing_checks_on_a_cpu(name):
    check = next(check for check in gpu_proofs.checks(TINY) if check.name == name)
    assert check.run(TINY) is not None


def test_machine_and_its_ceilings():
    rows = results("machine", TINY)
    assert set(gpu_machine.rates(rows)) == {"bfloat16", "float16", "tf32", "copy"}
    assert next(row for row in rows if row["case"] == "machine")["versions"]["torch"] == torch.__version__


def spoil(y: torch.Tensor) -> torch.Tensor:
    return y + torch.nn.functional.one_hot(torch.tensor(5), y.numel()).view(y.shape) * 0.1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (spoil, "y: element"),
        (lambda y: y * float("nan"), "y: element"),
        (lambda y: y + torch.rand(()) * 1e-9 * y.detach().abs().max(), "different bits"),
        (lambda y: y * 1 + 0.01 * (y - y.detach()), "dx: element"),  # the value is right, the gradient is not
    ],
)
def test_a_wrong_convolution_is_found_out(fault, words):
    problem = ConvProblem(batch=2, channels=(8, 1), out_sizes=(8, 8), selection="top")
    gpu_correctness.check_convolution(problem, "float32", TINY)
    with pytest.raises(AssertionError, match=words):
        gpu_correctness.check_convolution(problem, "float32", TINY, lambda *a, **k: fault(dynamic_conv2d(*a, **k)))


def test_one_wrong_instance_is_found_out():
    exact = torch.randn(4, 3, 5, 5)
    got = exact.clone()
    assert close_by_instance(got, exact, 1e-6) == 0
    got[2] = exact[1]
    with pytest.raises(AssertionError, match="instance 2"):
        close_by_instance(got, exact, 1e-2)
    got = exact.clone()
    got[1, 0, 0, 0] = float("nan")
    with pytest.raises(AssertionError, match="NaN"):
        close_by_instance(got, exact, 1e-2)


def test_a_plan_that_differs_is_found_out():
    plan, other = (RoutingPlan.from_levels(torch.tensor([[1], [level]]), 2) for level in (1, 2))
    with pytest.raises(AssertionError, match=r"plan\.levels differs"):
        gpu_blocks.same_plan(plan, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_move_with_their_strides(layout, gpu):
    x = in_layout(torch.randn(3, 4, 5, 6), layout)
    there = moved(x, torch.device("cuda:0"))
    assert (there.stride(), there.storage_offset()) == (x.stride(), x.storage_offset())
    assert torch.equal(there.cpu(), x)


SCRIPT = """
import json, os, sys, time
from pathlib import Path
from benchmarks import gpu_worker
from benchmarks.gpu_worker import Check, Context, Unavailable, work

def fine(context): return {"value": 1}
def wrong(context): assert False, "wrong value"
def missing(context): raise Unavailable("not here")
def dies(context): os._exit(9)
def hangs(context): time.sleep(60)
def breaks(context):
    gpu_worker.is_dead = lambda context: True
    raise RuntimeError("CUDA error: an illegal memory access")

_, _, step, context, share, file = sys.argv
if step == "unimportable":
    sys.exit("no module named triton")
checks = [Check(name.rstrip("0123456789"), globals()[name.rstrip("0123456789")]) for name in step.split()]
named = [Check(name, check.run) for name, check in zip(step.split(), checks)]
first, count = map(int, share.split("/"))
sys.exit(work(named, Context.of_text(context), Path(file), (first, count)))
"""


@pytest.fixture
def pool(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(SCRIPT)

    def run(names: str, limit: float = 60, stall: float = 20, workers: int = 1, step: str | None = None) -> dict:
        program = (sys.executable, str(script))
        rows = gpu_pool.run(step or names, names.split(), TINY, limit, stall, workers, program)
        assert [row["case"] for row in rows] == names.split()
        return {row["case"]: row for row in rows}

    return run


def test_nothing_that_a_check_does_loses_the_others(pool, capsys):
    rows = pool("fine1 wrong dies breaks missing fine2")
    assert {name: row["status"] for name, row in rows.items()} == {
        "fine1": "ok", "wrong": "failed", "dies": "failed", "breaks": "failed", "missing": "skipped", "fine2": "ok",
    }  # fmt: skip
    assert rows["fine2"]["value"] == 1
    assert "wrong value" in rows["wrong"]["error"]
    assert "status 9" in rows["dies"]["error"]
    assert rows["missing"]["reason"] == "not here"
    assert capsys.readouterr().out.count("\n") == 6


def test_a_hanging_check_is_ended_and_the_rest_runs(pool):
    rows = pool("hangs fine", stall=6)
    assert "no result for 6 s" in rows["hangs"]["error"]
    assert rows["fine"]["status"] == "ok"


def test_what_does_not_fit_the_time_is_skipped(pool):
    rows = pool("fine hangs fine2", limit=6)
    assert rows["fine"]["status"] == "ok"
    assert rows["hangs"]["reason"] == "out of time while it ran"
    assert rows["fine2"]["reason"] == "out of time"
    assert pool("fine", limit=0)["fine"]["reason"] == "out of time"


def test_a_worker_that_cannot_start_fails_its_checks_once(pool):
    rows = pool("fine1 fine2", step="unimportable")
    assert all("no module named triton" in row["error"] for row in rows.values())


def test_workers_share_the_checks(pool):
    rows = pool("fine1 fine2 fine3 fine4 fine5", workers=2)
    assert all(row["status"] == "ok" for row in rows.values())


def test_a_line_cut_off_is_left_out(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"begin": "a"}\n{"case": "a", "stat')
    assert gpu_worker.read(file) == (["a"], [])


def timed_row(case: str, **providers: float) -> dict:
    made = {
        name.replace("_", " "): {
            "median": seconds, "floor": 1e-6, "flops_ratio": 2.0, "dense_share": seconds, "realised": 1 / seconds / 2,
            "graph": True,
        }
        for name, seconds in providers.items()
    }  # fmt: skip
    return {"case": case, "status": "ok", "seconds": 1.0, "providers": made}


def test_targets_beside_what_was_measured():
    rows = {
        "plan B=1024, N=20": timed_row("plan B=1024, N=20", plan=9e-6),
        "block/256x8x8/bfloat16": timed_row(
            "block/256x8x8/bfloat16", op_uniform=0.6, op_zero=0.04, fused_full=0.5, composition_full=0.6
        ),
    }
    tuned = timed_row("block/256x8x8/bfloat16 max-autotune", op_uniform=0.8, op_zero=0.05)
    lines = {line["what"]: line for line in (target.line(rows) for target in gpu_table.TARGETS)}
    assert lines["plan of 20 blocks for 1,024 instances: seconds"]["met"] is True
    assert lines["block 256x8x8, all at level 0: time of dense"]["met"] is False
    assert lines["block 256x8x8, uniform mix: realised fraction"]["measured"] == pytest.approx(0.5 / 0.6)
    what = "block 256x8x8, uniform mix: realised fraction"
    target = next(target for target in gpu_table.TARGETS if target.what == what)
    assert target.measured(rows | {tuned["case"]: tuned}) == pytest.approx(0.5 / 0.8)  # the faster dense side counts
    assert lines["block 256x8x8, full level: fused kernel against two launches"]["measured"] == pytest.approx(1.2)
    assert lines["WRN-32-4, uniform mix: realised fraction"]["met"] is None


def test_every_target_is_a_case_that_is_timed():
    timed = {check.name for check in gpu_check.timed(Context("cpu"))}
    assert {target.case for target in gpu_table.TARGETS} <= timed


def test_report_says_the_important_last():
    document = gpu_check.new_document("GPU")
    rows = [
        timed_row("plan B=1024, N=20", plan=9e-6),
        {"case": "b", "status": "failed", "error": "E" * 999, "seconds": 0},
    ]
    document["steps"]["convolutions"] = {"seconds": 1, "cases": [*rows, gpu_pool.failure("c", "why")]}
    document["steps"]["blocks"] = {"seconds": 1, "cases": [{"case": "d", "status": "skipped", "reason": "time"}]}
    document["targets"] = [target.line({row["case"]: row for row in rows}) for target in gpu_table.TARGETS]
    *_, failed, _, last = gpu_table.render(document).splitlines()
    assert failed == "FAILED c: why"
    assert last.startswith("1 checks passed, 2 failed, 1 skipped; targets: 1 met, 0 not met")


def test_results_are_kept_and_steps_replaced(tmp_path):
    path = tmp_path / "gpu.json"
    document = gpu_check.load(path, "GPU")
    document["steps"]["machine"] = {"seconds": 1, "cases": []}
    gpu_check.keep(document, path)
    assert gpu_check.load(path, "GPU")["steps"] == document["steps"]
    assert gpu_check.load(path, "another")["steps"] == {}
    path.write_text("{")
    assert gpu_check.load(path, "GPU")["steps"] == {}


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), *arguments]
    return subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)


def test_without_a_gpu_one_clear_line():
    done = command()
    assert done.returncode == 2
    assert done.stderr == "gpu_check: a CUDA device is needed, torch finds none\n"


@pytest.mark.slow
def test_the_command_from_end_to_end(tmp_path):
    steps = ("build", "smoke", "machine", "convolutions")
    done = command("--device", "cpu", "--tiny", "--out", str(tmp_path), "--only", *steps[2:])
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "no-gpu.json").read_text())
    assert document["format"] == gpu_check.FORMAT
    assert set(document["steps"]) == set(steps)
    assert document["rates"]["copy"] > 0
    plan = next(row for row in document["steps"]["convolutions"]["cases"] if row["case"].startswith("plan"))
    assert plan["providers"]["plan"]["floor"] > 0
    assert "conv-in/16x6x6/tf32" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("written: ")


def test_a_broken_step_is_a_failure_and_the_budget_ends_the_rest(tmp_path, monkeypatch, capsys):
    run, clock = gpu_pool.run, [0.0]

    def passing_time(step, names, *rest):
        clock[0] += 100
        return run(step, names, *rest) if step == "blocks" else [{"case": "x", "status": "ok", "seconds": 1.0}]

    monkeypatch.setitem(gpu_check.STEPS, "proofs", gpu_check.Step(lambda context: 1 / 0))
    monkeypatch.setattr(gpu_pool, "run", passing_time)
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: clock[0])
    arguments = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--budget", "200", "--only", "proofs", "blocks"]
    assert gpu_check.main(arguments) == 1
    text = capsys.readouterr().out
    assert "FAILED proofs: ZeroDivisionError" in text
    assert "skipped block/16x6x6/bfloat16: out of time" in text


def test_tuning_needs_a_gpu():
    pytest.importorskip("triton", reason="triton is not installed")
    with pytest.raises(Unavailable, match="on a GPU"):
        gpu_tuning.tune(TINY)


def test_the_extension_builds_with_the_headers_in_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_machine.importlib.util, "find_spec", lambda name: None)
    with gpu_machine.build_helpers() as environment:
        program = textwrap.dedent("""
            from pathlib import Path
            from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
            extension = Pybind11Extension("x", ["x.cpp"], cxx_std=17)
            assert Path(extension.include_dirs[0], "pybind11/pybind11.h").exists()
            from distutils.ccompiler import CCompiler
            CCompiler.compile = lambda self, sources, **_: [source + ".o" for source in sources]
            with ParallelCompile(default=2):
                print(CCompiler.compile(None, ["a", "b"]), extension.extra_compile_args, build_ext.__module__)
        """)
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=tmp_path
        )
    assert done.stdout == "['a.o', 'b.o'] ['-std=c++17'] setuptools.command.build_ext\n", done.stderr
