"""One case: check every provider against its float64 oracle, time all of them interleaved, account for the work.

pytest-benchmark times ours; the other providers run, and are timed, in the setup hook before each of its rounds, so
that every round holds one call of each and a slow moment of the machine falls on all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from . import floors

Role = Literal["ours", "dense", "tuned", "alternative", "floor"]
Result = Tensor | Sequence[Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """What is computed, by everybody."""

    suite: str  # "residual", "conv-out-elastic", ...
    shape: str  # "64x32x32", "wrn32_4"
    batch: int
    mix: str  # how the levels are drawn
    dtype: str

    @property
    def id(self) -> str:
        """The case in one word, as pytest's ``-k`` and the results files know it."""
        return f"{self.suite}/{self.shape}/B{self.batch}/{self.mix}/{self.dtype}"


@dataclass(frozen=True)
class Expected:
    """The float64 oracle's result and the error that is allowed against it."""

    exact: Tensor
    allowed: float


@dataclass(frozen=True)
class Provider:
    """One way to compute a case. ``prepare`` runs before each call and is not timed."""

    name: str
    role: Role
    call: Callable[[], Result]
    expected: Expected
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Work:
    """What the case costs: FLOPs with the chosen levels, at full structure, and the bytes nobody can avoid."""

    flops: float
    dense_flops: float
    traffic: float


@dataclass(frozen=True)
class Settings:
    """How long a case may take and whether the dense side is compiled as well."""

    seconds: float = 1.0
    least_rounds: int = 7
    most_rounds: int = 51
    compile: Literal["none", "network", "all"] = "network"
    environment: dict[str, Any] = field(default_factory=dict)  # versions, threads, allocator: copied into every row


def joined(result: Result) -> Tensor:
    """A tensor as it is, a list of tensors as one flat tensor."""
    return result if isinstance(result, Tensor) else torch.cat([part.flatten() for part in result])


def expect(function: Callable[[torch.dtype], Result], dtype: torch.dtype, factor: float = 2.0) -> Expected:
    """The float64 result of ``function`` and ``factor`` times the largest error of the same expression in ``dtype``."""
    exact = joined(function(torch.float64))
    error = (joined(function(dtype)).double() - exact).abs().max().item() if exact.numel() else 0.0
    return Expected(exact, factor * error + torch.finfo(dtype).tiny)


def check(name: str, result: Result, expected: Expected) -> None:
    """Raise AssertionError unless ``result`` is the oracle's, nowhere NaN."""
    value = joined(result)
    if value.shape != expected.exact.shape:
        raise AssertionError(f"{name}: shape must be {tuple(expected.exact.shape)}, got {tuple(value.shape)}")
    if not value.numel():
        return
    error = (value.double() - expected.exact).abs().max().item()
    if not error <= expected.allowed:
        raise AssertionError(f"{name}: error against float64 must be at most {expected.allowed:.3g}, got {error:.3g}")


class Interleaved:
    """The setup hook: times one call of every peer, each round in another order, then prepares ours."""

    def __init__(
        self, ours: Provider, peers: Sequence[Provider], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.ours, self.peers, self.clock = ours, list(peers), clock
        self.times: dict[str, list[float]] = {peer.name: [] for peer in peers}
        self._round = 0

    def __call__(self) -> None:
        shift = self._round % max(len(self.peers), 1)
        for peer in self.peers[shift:] + self.peers[:shift]:
            self.times[peer.name].append(self._time(peer))
        self._round += 1
        if self.ours.prepare:
            self.ours.prepare()

    def _time(self, provider: Provider) -> float:
        if provider.prepare:
            provider.prepare()
        start = self.clock()
        provider.call()
        return self.clock() - start

    def round_seconds(self) -> float:
        """The time of one whole round, ours included, measured once and not kept."""
        return sum(self._time(provider) for provider in [self.ours, *self.peers])


def choose_rounds(round_seconds: float, settings: Settings) -> int:
    """As many rounds as fit the case's time, within the settings' limits.

    >>> choose_rounds(0.1, Settings(seconds=2.0))
    20
    """
    fitting = int(settings.seconds / max(round_seconds, 1e-9))
    return max(settings.least_rounds, min(settings.most_rounds, fitting))


def flops_ratio(work: Work) -> float | None:
    """FLOPs at full structure over FLOPs with the chosen levels; None when nothing is left to compute."""
    return work.dense_flops / work.flops if work.flops else None


def realised_fraction(dense_seconds: float, seconds: float, ratio: float | None) -> float | None:
    """(time of the best dense baseline / time) / FLOPs ratio: 1 when every FLOP saved is time saved."""
    return None if ratio is None else dense_seconds / seconds / ratio


def best(times: dict[str, float], names: Iterable[str]) -> str | None:
    """The fastest of ``names``; None when there is none."""
    return min(names, key=times.__getitem__, default=None)


def dense_role(name: str) -> Role:
    """Whether a dense provider is one that anybody can run, or needs private operators."""
    return "tuned" if name.endswith("-packed") else "dense"


def account(roles: dict[str, Role], times: dict[str, float], work: Work, floor: float) -> dict[str, Any]:
    """The arithmetic of a row: median seconds by provider to ratios, fractions and overheads.

    Providers of role "dense" are what anybody can run: the network in nn.Conv2d, eager, bn folded, compiled; "tuned" is
    the dense network on PyTorch's private prepacked operators. Providers of role "floor" are the bare convolutions of
    the levels: overhead is what a provider costs above the faster of them.
    """
    by_role = {role: [name for name in roles if roles[name] == role] for role in ("ours", "dense", "tuned", "floor")}
    tuned = best(times, by_role["dense"] + by_role["tuned"])
    dense, bare, ratio = best(times, by_role["dense"]), best(times, by_role["floor"]), flops_ratio(work)
    providers: dict[str, dict[str, Any]] = {}
    for name, seconds in times.items():
        providers[name] = {"role": roles[name], "median": seconds, "floor_share": floor / seconds}
        if dense is not None:
            providers[name]["dense_share"] = seconds / times[dense]
            providers[name]["realised"] = realised_fraction(times[dense], seconds, ratio)
            providers[name]["realised_tuned"] = realised_fraction(times[tuned], seconds, ratio)
        if bare is not None and roles[name] != "floor" and times[bare] > 0:
            providers[name]["overhead"] = seconds / times[bare] - 1
    return {
        "flops": work.flops,
        "dense_flops": work.dense_flops,
        "flops_ratio": ratio,
        "traffic": work.traffic,
        "floor": floor,
        "best_dense": dense,
        "best_tuned": tuned,
        "bare": bare,
        "providers": providers,
    }


def run(benchmark: Any, case: Case, providers: Sequence[Provider], work: Work, settings: Settings) -> None:
    """Check and time ``providers`` (the first is ours) and write the row of ``case`` into ``benchmark.extra_info``."""
    ours, *peers = providers
    with torch.inference_mode():
        for provider in providers:
            if provider.prepare:
                provider.prepare()
            check(f"{case.id}: {provider.name}", provider.call(), provider.expected)
        hook = Interleaved(ours, peers)
        rounds = choose_rounds(hook.round_seconds(), settings)
        benchmark.group = case.suite
        benchmark.pedantic(ours.call, setup=hook, rounds=rounds)
        if benchmark.disabled:
            return
        dtype = DTYPES[case.dtype]
        floor = floors.floor_seconds(work.flops, work.traffic, floors.matrix_rate(dtype), floors.copy_bandwidth())
    samples = {ours.name: list(benchmark.stats.stats.data), **hook.times}
    medians = {name: statistics.median(times) for name, times in samples.items()}
    row = account({p.name: p.role for p in providers}, medians, work, floor)
    for name, times in samples.items():
        lower, _, upper = statistics.quantiles(times, n=4, method="inclusive")
        row["providers"][name] |= {"lower_quartile": lower, "upper_quartile": upper}
    benchmark.extra_info.update(describe(case, settings), rounds=rounds, **row)


def describe(case: Case, settings: Settings) -> dict[str, Any]:
    """What every row says about itself: the case, the machine, versions, threads, allocator."""
    return {
        "case": case.id,
        "suite": case.suite,
        "shape": case.shape,
        "batch": case.batch,
        "mix": case.mix,
        "dtype": case.dtype,
        **settings.environment,
    }


def mix_levels(mix: str, batch: int, levels: int = 4, seed: int = 0) -> Tensor:
    """Levels int32 [batch] of a named mix: "uniform" (equal counts, shuffled), "full", "zero" or "quarter" (level 1).

    Raises ValueError for another name.
    """
    if mix == "uniform":
        counts = torch.arange(batch) % levels
        return counts[torch.randperm(batch, generator=torch.Generator().manual_seed(seed))].to(torch.int32)
    constant = {"full": levels - 1, "zero": 0, "quarter": 1}
    if mix not in constant:
        raise ValueError(f"mix_levels: mix must be one of uniform, full, zero, quarter, got {mix!r}")
    return torch.full((batch,), constant[mix], dtype=torch.int32)


def draw_structures(costs: Tensor, batch: int, ratio: float, seed: int = 0, tolerance: float = 0.002) -> Tensor:
    """Structures int32 [batch, N], level by level at random, whose mean cost is 1 / ``ratio`` of the full one's.

    Args:
        costs: [N, L], what each block costs at each level; the last level is the full one.
        ratio: full cost over mean cost, above 1.
        tolerance: relative; batches are drawn until their mean is as near as that.

    The levels are independent draws with P(l) proportional to exp(tilt * share of level l); bisection finds the tilt
    that gives the mean. Raises ValueError when no batch of 10,000 comes near enough.
    """
    costs = costs.double()
    target, shares = costs[:, -1].sum() / ratio, costs / costs[:, -1:]
    low, high = -50.0, 50.0
    for _ in range(60):
        tilt = (low + high) / 2
        cheaper = ((shares * tilt).softmax(1) * costs).sum() < target
        low, high = (tilt, high) if cheaper else (low, tilt)
    probabilities, generator = (shares * low).softmax(1), torch.Generator().manual_seed(seed)
    for _ in range(10_000):
        levels = probabilities.multinomial(batch, replacement=True, generator=generator)  # [N, B]
        mean = costs.gather(1, levels).sum(0).mean()
        if abs(mean / target - 1) <= tolerance:
            return levels.T.contiguous().to(torch.int32)
    raise ValueError(
        f"draw_structures: ratio must be within reach of {batch} structures to {tolerance:.1%}, got {ratio}"
    )
