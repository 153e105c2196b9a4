"""The processes of one run: this one alone, or those that torchrun has started, which share its batches.

Functions named "of all" are collective: every process must call them, in the same order.
"""

import atexit
import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from den.support import launched
from den.support.device import choose_device

T = TypeVar("T")


class FirstRankError(ValueError):
    """An error of the first process, raised in the others too; the first one tells it."""

    told = True


def count() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if count() > 1 else 0


def first() -> bool:
    """True in the process that writes the run's folder and shows its progress."""
    return rank() == 0


def join(device_name: str) -> torch.device:
    """Meet the other processes of the run, where there are any, and return this one's device.

    Processes that torchrun has started form a group: gloo between CPUs, and NCCL between GPUs, of which each process
    takes its own.  It lasts until the process ends.  Where there is a group already it stays.

    Raises ValueError for a device that is not there or that several processes would share.
    """
    if not dist.is_available() or not (launched.shared() or dist.is_initialized()):
        return choose_device(device_name)
    device = _own_device(choose_device(device_name), device_name)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)  # later, threads of gloo could no longer be ended
    return device


def _own_device(device: torch.device, name: str) -> torch.device:
    """The device of a process among several."""
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(f"config: device must be auto, cpu or cuda with several processes, got {name!r}")
    own, there = launched.rank_here(), torch.cuda.device_count()
    if own >= there:
        raise ValueError(f"config: device must be a GPU for each process, got {there} GPUs and process {own + 1}")
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_loss_of_another(error: RuntimeError) -> bool:
    """True for an error by which this process learns that another one of the run has ended, or does not answer."""
    return count() > 1 and (isinstance(error, dist.DistBackendError) or "gloo" in str(error))


def launch() -> str | None:
    """Name of the launch by torchrun that this process belongs to, the same after its restarts; None: not launched."""
    name = launched.run_id()
    if name == "none":  # torchrun was given none: its own process stands for it
        return f"{socket.gethostname()}:{os.getppid()}"
    return name


def processes_here() -> int:
    """Processes of the run on this machine."""
    return launched.processes_here() if count() > 1 else 1


def total(values: Tensor) -> Tensor:
    """Sum over the values [...] of all processes, without a gradient; a GPU is not waited for."""
    if count() == 1:
        return values.detach()
    summed = values.detach().clone()
    dist.all_reduce(summed)
    return summed


def mean(values: Tensor) -> Tensor:
    """Mean over the values [...] of all processes, without a gradient; a GPU is not waited for."""
    return total(values) / count() if count() > 1 else values.detach()


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


def in_turns(own: list[T]) -> list[T]:
    """The values that the processes of all made in turns, process r those at r, r + R, ..., in one order."""
    if count() == 1:
        return own
    lists = gathered(own)
    return [each[i] for i in range(max(map(len, lists))) for each in lists if i < len(each)]


def from_first(make: Callable[[], T]) -> T:
    """Call `make` in the first of all processes only; all return its result, or raise its ValueError."""
    if count() == 1:
        return make()
    told: list[Any] = [None, None]
    failed: ValueError | None = None
    if first():
        try:
            told[0] = make()
        except ValueError as error:
            failed, told[1] = error, str(error)
    dist.broadcast_object_list(told)
    if failed is not None:
        raise failed
    if told[1] is not None:
        raise FirstRankError(told[1])
    return cast(T, told[0])
