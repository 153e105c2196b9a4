"""Times on a device: contenders interleaved, inputs rotated through more memory than the cache, launches as graphs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from den_kernels._triton.clock import elapsed, recorded

from . import floors
from .gpu_worker import Context
from .harness import Role, Settings, Work, account, choose_rounds

# Names of the ways to multiply: dtype of the tensors, and whether float32 may be rounded to TF32.
RATES = {"bfloat16": (torch.bfloat16, False), "float16": (torch.float16, False), "tf32": (torch.float32, True)}
SHORTEST = 2e-4  # seconds that one timed replay should take at least


class Contender(NamedTuple):
    """One way to compute a case: `call(i)` on the i-th of the input sets."""

    name: str
    role: Role
    call: Callable[[int], object]


def cache_bytes(context: Context) -> int:
    """Of the last cache before memory."""
    if not context.is_cuda:
        return 1 << 20
    return int(getattr(torch.cuda.get_device_properties(context.place), "L2_cache_size", 64 << 20))


def input_sets(context: Context, bytes_of_a_set: int) -> int:
    """How many sets of inputs are larger than three times the cache, between 2 and 24.

    >>> input_sets(Context("cpu"), 1 << 20)
    4
    """
    return max(2, min(24, 1 + math.ceil(3 * cache_bytes(context) / max(bytes_of_a_set, 1))))


def capture(call: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], bool]:
    """A replay of the call's graph, and True; where it cannot be captured, or on a CPU, the call itself, and False."""
    if device.type != "cuda":
        return call, False
    try:
        replay = recorded(call, device)
        replay()
        torch.cuda.synchronize()
    except RuntimeError:
        torch.cuda.synchronize()
        call()
        return call, False
    return replay, True


class Timed(NamedTuple):
    """A contender ready to be timed: `run` makes `calls` calls."""

    run: Callable[[], object]
    calls: int
    graph: bool


def ready(contender: Contender, sets: int, context: Context) -> Timed:
    """The contender over all input sets, often enough that one run is not too short to time."""

    def over_sets() -> None:
        for i in range(sets):
            contender.call(i)

    over_sets()
    run, graph = capture(over_sets, context.place)
    once = min(elapsed(run, context.place) for _ in range(2))
    times = 1 if context.tiny else repeats(once)
    if times > 1:
        run, graph = capture(lambda: [over_sets() for _ in range(times)], context.place)
    return Timed(run, times * sets, graph)


def repeats(seconds: float) -> int:
    """How often something of so many seconds runs in one timing, at most 16 times.

    >>> repeats(1e-3), repeats(6e-5), repeats(1e-6)
    (1, 4, 16)
    """
    return max(1, min(16, math.ceil(SHORTEST / max(seconds, 1e-9))))


def interleave(runs: dict[str, Timed], context: Context) -> tuple[dict[str, list[float]], int]:
    """Seconds of a call of each in every round, the order of a round rotating; the number of rounds."""
    names, device = list(runs), context.place
    for timed in runs.values():
        timed.run()
    a_round = sum(elapsed(timed.run, device) for timed in runs.values())
    settings = Settings(context.seconds, 3 if context.tiny else 9, 3 if context.tiny else 101)
    rounds = choose_rounds(a_round, settings)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(elapsed(runs[name].run, device) / runs[name].calls)
    return times, rounds


def compete(
    contenders: Sequence[Contender], sets: int, works: Mapping[str, Work], rate: str, context: Context
) -> dict[str, Any]:
    """Time all contenders, interleaved, and account for each as `harness.account` does.

    works: what each contender computes, by its name: mixes of levels differ, in floor and in FLOPs ratio.
    """
    if context.warm:
        for contender in contenders:
            contender.call(0)
        return {"warm": True}
    runs = {contender.name: ready(contender, sets, context) for contender in contenders}
    times, rounds = interleave(runs, context)
    medians = {name: statistics.median(values) for name, values in times.items()}
    roles = {contender.name: contender.role for contender in contenders}
    providers = {}
    for name, work in works.items():
        row = account(roles, medians, work, floor(work, rate, context))
        lower, _, upper = statistics.quantiles(times[name], n=4, method="inclusive")
        own = {"lower_quartile": lower, "upper_quartile": upper, "graph": runs[name].graph, "floor": row["floor"]}
        providers[name] = row["providers"][name] | own | {"flops_ratio": row["flops_ratio"]}
    return {"best_dense": row["best_dense"], "providers": providers, "rounds": rounds, "input_sets": sets}


def floor(work: Work, rate: str, context: Context) -> float:
    """The least seconds that the measured ceilings allow; 0 where they were not measured."""
    if rate not in context.rates or "copy" not in context.rates:
        return 0.0
    return floors.floor_seconds(work.flops, work.traffic, context.rates[rate], context.rates["copy"])
