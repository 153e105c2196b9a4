"""`python -m benchmarks.gpu_check --rehearse`: the whole script without a GPU, on the simulated one of the tests.

A pytest plugin (`-p benchmarks.rehearsal`) runs every check on the simulated GPU, ``python -m benchmarks.rehearsal
MODULE ARGUMENTS`` a program. Launches of Triton kernels go to Triton's interpreter, and the operators of some checks
run as they would on a GPU; the others compute on the CPU, because the interpreter takes seconds for what a CPU does in
milliseconds. The CUDA kernels, which nothing can run here, are stood in for by PyTorch. Each check says what computed
it. Nothing is built. compute-sanitizer and ncu are stood in for by scripts that run the same program and print what
those would print.
"""

import contextlib
import os
import runpy
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from den_kernels import _cuda
from den_kernels.float32 import allows_tf32
from den_kernels.plan_sort import plan_levels, plan_levels_torch, plan_masks, plan_masks_torch
from den_kernels.rows import pool_rows

from . import floors, harness

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("compute-sanitizer", "ncu")
# Operators run as on a GPU in these checks and in the smoke, their kernels interpreted; everywhere else they are the
# CPU's. Launches are left out while something is timed.
INTERPRETED = ("test_composition", "test_mask_graph", "test_norm[bfloat16-levels-plain]")
# Of every parameter these values; of those that are not named here all.
KEPT: dict[str, tuple[object, ...]] = {
    "way": ("float32", "bfloat16"), "convolution": ("out", "mask", "cardinality"), "problem": ("composition 64x32x32",),
    "batch": (1, 5), "groups": (3, 4), "mode": ("eager",), "tool": ("memcheck",),
}  # fmt: skip
METRICS = {
    "Kernel Name": ("", "rehearsed"), "gpu__time_duration.sum": ("ns", "1000"),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": ("%", "40.0"),
    "lts__t_sectors.avg.pct_of_peak_sustained_elapsed": ("%", "20.0"),
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("inst", "1.5"),
}  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    """Environment of the processes of a rehearsal; writes scripts that stand in for the tools to a folder."""
    for tool in TOOLS:
        script = folder / tool
        script.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" -m benchmarks.rehearsal --as {tool} "$@"\n', encoding="utf-8"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    path = os.pathsep.join([str(folder), os.environ.get("PATH", "")])
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TRITON_INTERPRET"), "1")
    return one | {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "DEN_KERNELS_CUDA": "0"}


class Account:
    """Counts of what computed the current check: launches interpreted or left out, stand-ins."""

    def __init__(self) -> None:
        self.as_on_gpu, self.interprets, self.replays = False, True, True  # operators; launches, and those of graphs
        self.launches = self.left_out = self.stand_ins = 0

    def __str__(self) -> str:
        counts = {
            "launches interpreted": self.launches, "launches left out": self.left_out,
            "CUDA launches by PyTorch": self.stand_ins,
        }  # fmt: skip
        operators = "operators as on a GPU" if self.as_on_gpu else "operators of the CPU"
        return ", ".join([operators, *(f"{count} {what}" for what, count in counts.items() if count)])


@contextlib.contextmanager
def stage() -> Iterator[Account]:
    """Context in which "cuda" is the simulated GPU, with stand-ins for all that runs on a GPU only."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from tests.simulated_gpu import Device, simulated

    account = Account()
    with pytest.MonkeyPatch.context() as patches, simulated(patches):
        patches.setattr(torch, "compile", lambda module, **_: module)
        patches.setattr(torch.cuda.profiler, "start", lambda: None)
        patches.setattr(torch.cuda.profiler, "stop", lambda: None)
        for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
            patches.setattr(torch.cuda, name, lambda device=None: 0)
        patches.setattr(floors, "GPU_SIZE", 64)
        patches.setattr(floors, "GPU_COPIED", 2**16)
        for name, function in stand_ins(account).items():
            patches.setattr(_cuda, name, function)
        patches.setattr(Device, "operators", {})
        with contextlib.suppress(ImportError):  # without Triton its kernels are left out, as on a GPU
            from den_kernels._triton.launch import Launch
            from tests.interpreted import repair

            repair()
            patches.setattr(Launch, "run", interpreted(account))
        yield account


def interpreted(account: Account) -> Callable[..., dict[str, Any]]:
    """`Launch.run` on the memory behind simulated tensors; a graph that is being captured keeps the launch."""
    from tests.simulated_gpu import Device, values_of

    def run(launch: Any, like: Tensor) -> dict[str, Any]:  # like: of any shape
        def call(**arguments: Any) -> None:
            with _disable_current_modes():
                launch.kernel[(launch.programs,)](**{name: in_memory(value) for name, value in arguments.items()})

        if not account.interprets:
            account.left_out += 1
            return launch.arguments
        bases = [getattr(each, "base", each) for each in launch.arguments.values()]  # of descriptors, their tensors
        device, values = Device.current, values_of(bases)
        account.launches += 1
        device.writes.check(str(launch.kernel), values)
        call(**launch.arguments)
        device.writes.note(values)
        if device.recording is not None and account.replays:
            device.recording.append((call, (), launch.arguments, None))
        return launch.arguments

    return run


def in_memory(argument: Any) -> Any:
    """An argument of a kernel with the memory behind a simulated tensor [...], also that of a descriptor."""
    from tests.simulated_gpu import OnGpu

    if hasattr(argument, "block_shape"):
        return replace(argument, base=in_memory(argument.base))
    return argument.values if isinstance(argument, OnGpu) else argument


def layout_of(x: Tensor, route: Any, weights: Any) -> Any:
    """`_cuda.layout_of` for blocks of any size (x [B, C, H, W]), also where the extension has no CUDA kernels."""
    if x.device.type != "cuda" or route.mask is not None or (x.dtype == torch.float32 and not allows_tf32()):
        return None
    return _cuda._layout(_cuda._problem(x, weights)) or StandIn()


class StandIn:
    """The layout of a block that is too small for the fused kernel: it is called where a check asks for it only."""

    @staticmethod
    def is_worth(problem: Any) -> bool:
        """False: no operator chooses the stand-in."""
        return False


def stand_ins(account: Account) -> dict[str, Callable[..., Any]]:
    """Replacements, by name, of the functions that `_cuda` has of the extension, made of PyTorch's operations."""

    def fill(outputs: Sequence[Tensor], made: Sequence[Tensor]) -> None:  # output and values of one shape
        account.stand_ins += 1
        for output, values in zip(outputs, made, strict=True):
            output.copy_(values)

    def fused_residual(x: Tensor, out: Tensor, route: Any, weights: Any, layout: Any, *, holds_shortcut: bool) -> None:
        """As `_cuda.fused_residual`: x [B, C, H, W], out [B, C', H', W']."""
        from den_kernels._residual_gpu import masked_branch

        account.stand_ins += 1
        branch = masked_branch(x, route, weights)
        if not holds_shortcut:
            out.copy_(pool_rows(x, weights.conv2.shape[0], weights.stride))
        out.add_(branch)
        if weights.relu:
            out.relu_()

    return {
        "layout_of": layout_of,
        "fused_residual": fused_residual,
        "plans_levels": lambda device, groups: device.type == "cuda",
        "plans_masks": lambda device, groups: device.type == "cuda",
        "plan_levels": lambda levels, groups, *plan: fill(plan, plan_levels_torch(levels, groups)),
        "plan_masks": lambda masks, *plan: fill(plan, plan_masks_torch(masks)),
    }


def operators() -> dict[str, Callable[..., Any]]:
    """Functions that the operators run on a GPU, by the name that the dispatcher gives the operators."""
    names = ("dynamic_conv", "dynamic_residual", "_triton.norm")  # the package has functions of the first two names
    dynamic_conv, dynamic_residual, norm = (import_module(f"den_kernels.{name}") for name in names)
    return {
        "den_kernels.plan_levels.default": plan_levels,
        "den_kernels.plan_masks.default": plan_masks,
        "den_kernels.dynamic_conv2d.default": dynamic_conv._forward,
        "den_kernels.dynamic_conv2d_backward.default": dynamic_conv._backward,
        "den_kernels.dynamic_residual.default": dynamic_residual._OP.functional_op._init_fn,
        "den_kernels.dynamic_residual_.default": dynamic_residual._OP.in_place_op._init_fn,
        "den_kernels.dynamic_norm.default": norm.forward,
        "den_kernels.dynamic_norm_backward.default": norm.backward,
    }


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep every check, with few of its parameters."""

    def is_kept(item: pytest.Item) -> bool:
        given = getattr(item, "callspec", None)
        few = not item.name.startswith("test_composition")
        return not given or all(not few or value in KEPT.get(name, (value,)) for name, value in given.params.items())

    items[:] = [item for item in items if is_kept(item)]


COMPUTED = pytest.StashKey[object]()  # by what, of a check


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    if call.when == "call" and COMPUTED in item.stash:
        item.user_properties.append(("computed", str(item.stash[COMPUTED])))


@pytest.fixture(autouse=True)
def staged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The check on the simulated GPU, or on the CPU where torch traces it."""
    if request.node.get_closest_marker("traced"):
        request.node.stash[COMPUTED] = "on the CPU"
        yield
        return
    with stage() as account:
        request.node.stash[COMPUTED] = account
        interpreted = request.node.name.startswith(INTERPRETED) or request.node.get_closest_marker("smoke")
        if interpreted and os.environ.get("TRITON_INTERPRET") == "1":
            from tests.simulated_gpu import Device

            account.as_on_gpu = True
            monkeypatch.setattr(Device, "operators", operators())
        monkeypatch.setattr(harness, "clock_of", untimed(account))
        yield


def untimed(account: Account, clock_of: Callable[[str], Any] = harness.clock_of) -> Callable[[str], Any]:
    """`harness.clock_of`: from here on launches are left out."""

    def chosen(device: str) -> Any:
        account.interprets = False
        return clock_of(device)

    return chosen


def run(module: str, arguments: list[str]) -> int:
    """A program on the stage; its exit status."""
    sys.argv = [module, *arguments]
    try:
        with stage() as account, pytest.MonkeyPatch.context() as patches:
            account.replays = module != "den_kernels.tune"  # its replays are only timed
            if module == "den_kernels.tune":
                from den_kernels._triton import trial

                tiny = [trial.Case("convolve", 16, 4, 2, torch.bfloat16)]
                patches.setattr(trial, "cases", lambda *_: tiny)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


def tool(name: str, arguments: list[str]) -> int:
    """A stand-in for a tool: run the Python program behind its options, then print what the tool would."""
    module = arguments.index("-m") + 1
    status = run(arguments[module], arguments[module + 1 :])
    if name == "ncu":
        lines = [list(METRICS), [unit for unit, _ in METRICS.values()], *[[v for _, v in METRICS.values()]] * 2]
        print("\n".join(",".join(f'"{cell}"' for cell in line) for line in lines))
    else:
        print("========= ERROR SUMMARY: 0 errors (rehearsed)")
    return status


if __name__ == "__main__":
    sys.exit(tool(sys.argv[2], sys.argv[3:]) if sys.argv[1] == "--as" else run(sys.argv[1], sys.argv[2:]))
