"""`python -m benchmarks.gpu_check --rehearse`: the whole script without a GPU, on the simulated one of the tests.

Launches of Triton kernels go to Triton's interpreter, and the operators of some checks run as they would on a GPU; the
others compute on the CPU, because the interpreter takes seconds for what a CPU does in milliseconds. The CUDA kernels,
which nothing can run here, are stood in for by PyTorch. Each row of the results says what computed it. Nothing is
built. compute-sanitizer and ncu are stood in for by scripts that run the same program and print what those would print.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import runpy
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from den_kernels import _cuda
from den_kernels.float32 import allows_tf32
from den_kernels.plan_sort import plan_levels, plan_levels_torch, plan_masks, plan_masks_torch
from den_kernels.rows import pool_rows

from .gpu_worker import Check, Context, share_of, work

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("compute-sanitizer", "ncu")
# Operators run as on a GPU in these checks, their kernels interpreted; everywhere else they are the CPU's.
INTERPRETED = ("smoke", "composition", "graph: block, new masks", "norm levels/bfloat16")
# Their launches are interpreted while kernels are compiled (`Context.warm`), and left out while they are timed. The
# tuner's are left out in the replays that it times.
TIMED = ("conv-", "block/")
# torch traces these itself, and takes no tensor of a simulated GPU; builds and rates are those of this machine.
ON_CPU = ("export", "opcheck", "extension", "rate")
METRICS = {
    "Kernel Name": ("", "rehearsed"), "gpu__time_duration.sum": ("ns", "1000"),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": ("%", "40.0"),
    "lts__t_sectors.avg.pct_of_peak_sustained_elapsed": ("%", "20.0"),
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("inst", "1.5"),
}  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    """What the processes of a rehearsal are started with; the tools' stand-ins are written to a folder."""
    for tool in TOOLS:
        script = folder / tool
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m benchmarks.rehearsal {tool} "$@"\n', encoding="utf-8")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    path = os.pathsep.join([str(folder), os.environ.get("PATH", "")])
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TRITON_INTERPRET"), "1")
    return one | {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "DEN_KERNELS_CUDA": "0"}


class Patches(contextlib.ExitStack):
    """Attributes changed until the end, as pytest's monkeypatch does."""

    def setattr(self, owner: Any, name: str, value: Any) -> None:
        """owner.name = value."""
        self.enter_context(mock.patch.object(owner, name, value, create=True))


class Account:
    """What computed the current check."""

    def __init__(self) -> None:
        self.begin(False)

    def begin(self, as_on_gpu: bool, interprets: bool = True, replays: bool = True) -> None:
        """Another check: whether operators run as on a GPU, launches are interpreted, and again in a replay."""
        self.as_on_gpu, self.interprets, self.replays = as_on_gpu, interprets, replays
        self.launches = self.left_out = self.stand_ins = 0

    def text(self) -> str:
        """In words."""
        counts = {
            "launches interpreted": self.launches, "launches left out": self.left_out,
            "CUDA launches by PyTorch": self.stand_ins,
        }  # fmt: skip
        operators = "operators as on a GPU" if self.as_on_gpu else "operators of the CPU"
        return ", ".join([operators, *(f"{count} {what}" for what, count in counts.items() if count)])


@contextlib.contextmanager
def stage() -> Iterator[Account]:
    """In here "cuda" is the simulated GPU, and everything that runs on a GPU only has something that runs for it."""
    sys.path.append(str(ROOT))
    from tests.simulated_gpu import Device, simulated

    account = Account()
    with Patches() as patches, simulated(patches):
        patches.setattr(torch, "compile", lambda module, **_: module)
        patches.setattr(torch.cuda.profiler, "start", lambda: None)
        patches.setattr(torch.cuda.profiler, "stop", lambda: None)
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

    def run(launch: Any, like: Tensor) -> dict[str, Any]:
        def call(**arguments: Any) -> None:
            with _disable_current_modes():
                launch.kernel[(launch.programs,)](**arguments)

        if not account.interprets:
            account.left_out += 1
            return launch.arguments
        device, values = Device.current, values_of(list(launch.arguments.values()))
        account.launches += 1
        plain = {n: getattr(t, "values", t) if isinstance(t, Tensor) else t for n, t in launch.arguments.items()}
        device.writes.check(str(launch.kernel), values)
        call(**plain)
        device.writes.note(values)
        if device.recording is not None and account.replays:
            device.recording.append((call, (), launch.arguments, None))
        return launch.arguments

    return run


def layout_of(x: Tensor, route: Any, weights: Any) -> Any:
    """`_cuda.layout_of` without asking whether the extension has CUDA kernels, for blocks of any size."""
    if x.device.type != "cuda" or route.mask is not None or (x.dtype == torch.float32 and not allows_tf32()):
        return None
    return _cuda._layout(_cuda._problem(x, weights)) or StandIn()


class StandIn:
    """The layout of a block that is too small for the fused kernel: it is called where a check asks for it only."""

    @staticmethod
    def is_worth(problem: Any) -> bool:
        """Whether an operator chooses it."""
        return False


def stand_ins(account: Account) -> dict[str, Callable[..., Any]]:
    """What `_cuda` has of the extension, by PyTorch's operations."""

    def fill(outputs: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        account.stand_ins += 1
        for output, values in zip(outputs, made, strict=True):
            output.copy_(values)

    def fused_residual(x: Tensor, out: Tensor, route: Any, weights: Any, layout: Any, *, holds_shortcut: bool) -> None:
        from den_kernels._residual_gpu import add_branch_masked

        account.stand_ins += 1
        if not holds_shortcut:
            out.copy_(pool_rows(x, weights.conv2.shape[0], weights.stride))
        add_branch_masked(x, out, route, weights)
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
    """What the operators run on a GPU, by the name that the dispatcher gives them."""
    names = ("dynamic_conv", "dynamic_residual", "_triton.norm")  # the package has functions of the first two names
    dynamic_conv, dynamic_residual, norm = (import_module(f"den_kernels.{name}") for name in names)
    return {
        "den_kernels.plan_levels.default": plan_levels,
        "den_kernels.plan_masks.default": plan_masks,
        "den_kernels.dynamic_conv2d.default": dynamic_conv._forward,
        "den_kernels.dynamic_conv2d_backward.default": dynamic_conv._dynamic_conv2d_backward._init_fn,
        "den_kernels.dynamic_residual.default": dynamic_residual._OP.functional_op._init_fn,
        "den_kernels.dynamic_residual_.default": dynamic_residual._OP.in_place_op._init_fn,
        "den_kernels.dynamic_norm.default": norm.forward,
        "den_kernels.dynamic_norm_backward.default": norm.backward,
    }


def rehearse(checks: list[Check], context: Context, file: Path, share: tuple[int, int]) -> int:
    """`gpu_worker.work` on the stage, or on the CPU what cannot be on it; each row says what computed it."""
    mine = set(share_of([check.name for check in checks], share))
    here = [check for check in checks if check.name in mine]
    on_cpu = [check for check in here if check.name.startswith(ON_CPU)]
    work(
        [Check(name, functools.partial(run_on_cpu, run)) for name, run in on_cpu],
        dataclasses.replace(context, device="cpu"),
        file,
    )
    with stage() as account:
        staged = [check for check in here if check not in on_cpu]
        return work([Check(one.name, functools.partial(run_on_stage, one, account)) for one in staged], context, file)


def run_on_cpu(run: Callable[[Context], dict[str, Any]], context: Context) -> dict[str, Any]:
    """One check without a GPU."""
    return run(context) | {"computed": "on the CPU"}


def run_on_stage(check: Check, account: Account, context: Context) -> dict[str, Any]:
    """One check on the simulated GPU."""
    from tests.simulated_gpu import Device

    as_on_gpu = check.name.startswith(INTERPRETED) and os.environ.get("TRITON_INTERPRET") == "1"
    account.begin(as_on_gpu, context.warm or not check.name.startswith(TIMED), check.name != "tune")
    with mock.patch.object(Device, "operators", operators() if as_on_gpu else {}):
        return check.run(context) | {"computed": account.text()}


def tool(name: str, arguments: list[str]) -> int:
    """A stand-in for a tool: run the Python program behind its options on the stage, then print what it would."""
    module = arguments.index("-m") + 1
    sys.argv = arguments[module:]
    try:
        with stage():
            runpy.run_module(arguments[module], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    if name == "ncu":
        lines = [list(METRICS), [unit for unit, _ in METRICS.values()], *[[v for _, v in METRICS.values()]] * 2]
        print("\n".join(",".join(f'"{cell}"' for cell in line) for line in lines))
    else:
        print("========= ERROR SUMMARY: 0 errors (rehearsed)")
    return status


if __name__ == "__main__":
    sys.exit(tool(sys.argv[1], sys.argv[2:]))
