"""One case: check every provider against its float64 oracle, time all of them interleaved, account for the work.

pytest-benchmark times ours; the other providers run, and are timed, in the setup hook before each of its rounds, so
that every round holds one call of each and a slow moment of the machine falls on all alike. On a GPU the hook times
ours as well, by events.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from . import floors
from .allocations import call_peak, skip_when_exhausted
from .clocks import Clock, clock_of
from .precision import float32_products

Role = Literal["ours", "dense", "tuned", "alternative", "floor"]
Result = Tensor | Sequence[Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROVIDERS = (
    *("ours", "ours-inplace", "ours-plan", "ours-whole"),
    *("dense-eager", "dense-folded", "dense-compiled", "dense-packed", "dense-whole"),
    *("masked", "bucket", "per-instance", "grouped", "one-by-one", "one-by-one-whole", "bare", "bare-packed"),
)


@dataclass(frozen=True)
class Case:
    """What is computed, by everybody."""

    suite: str  # "residual", "conv-out-elastic", ...
    shape: str  # "64x32x32", "wrn32_4"
    batch: int
    mix: str  # how the levels are drawn
    dtype: str
    device: str = "cpu"

    @property
    def id(self) -> str:
        """The case in one word, as pytest's ``-k`` and the results files know it."""
        place = "" if self.device == "cpu" else f"/{self.device}"
        return f"{self.suite}/{self.shape}/B{self.batch}/{self.mix}/{self.dtype}{place}"


@dataclass(frozen=True)
class Expected:
    """The float64 oracle's result and the error that is allowed against it, one for all or one an element."""

    exact: Tensor
    allowed: float | Tensor


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
    providers: tuple[str, ...] = ()  # none: all; else only these beside ours
    environment: dict[str, Any] = field(default_factory=dict)  # versions, threads, allocator: copied into every row


def joined(result: Result) -> Tensor:
    """A tensor as it is, a list of tensors as one flat tensor, on the CPU."""
    if isinstance(result, Tensor):
        return result.detach().cpu()
    return torch.cat([part.detach().flatten() for part in result] or [torch.empty(0)]).cpu()


def expect(
    function: Callable[[torch.dtype], Result], dtype: torch.dtype, factor: float = 2.0, least: float = 0.0
) -> Expected:
    """The float64 result of ``function`` and ``factor`` times the largest error of the same expression in ``dtype``.

    The error counts for at least the rounding of the largest value. Of a list of tensors each has an error of its own,
    which counts for at least the median of them all, in relation to the largest value of each: that of a single number
    may be small by chance.  ``least``: what is allowed at least, in relation to the largest value of each.
    """
    exact, rounded = function(torch.float64), function(dtype)
    if isinstance(exact, Tensor):
        return Expected(joined(exact), factor * max(_error(exact, rounded), torch.finfo(dtype).eps / 2 * _size(exact)))
    errors = [_error(e, r) for e, r in zip(exact, rounded, strict=True)]
    sizes = [_size(e) for e in exact]
    usual = statistics.median([error / size for error, size in zip(errors, sizes, strict=True) if size] or [0.0])
    least = max(usual, torch.finfo(dtype).eps / 2, least / factor)
    allowed = [factor * max(error, least * size) for error, size in zip(errors, sizes, strict=True)]
    parts = [torch.full((e.numel(),), bound, dtype=torch.float64) for e, bound in zip(exact, allowed, strict=True)]
    return Expected(joined(exact), torch.cat(parts) if parts else 0.0)


def _size(exact: Tensor) -> float:
    return exact.detach().abs().max().item() if exact.numel() else 0.0


def _error(exact: Tensor, rounded: Tensor) -> float:
    return _size(rounded.detach().double() - exact.detach())


def check(name: str, result: Result, expected: Expected) -> None:
    """Raise AssertionError unless ``result`` is the oracle's, nowhere NaN."""
    value = joined(result)
    if value.shape != expected.exact.shape:
        raise AssertionError(f"{name}: shape must be {tuple(expected.exact.shape)}, got {tuple(value.shape)}")
    if not value.numel():
        return
    errors = (value.double() - expected.exact).abs()
    allowed = torch.as_tensor(expected.allowed, dtype=torch.float64).expand_as(errors)
    wrong = ~(errors <= allowed)
    if wrong.any():
        worst = (errors - allowed).nan_to_num(torch.inf).argmax()
        error, bound = errors.flatten()[worst].item(), allowed.flatten()[worst].item()
        raise AssertionError(f"{name}: error against float64 must be at most {bound:.3g}, got {error:.3g}")


class Interleaved:
    """The setup hook: times one call of every peer, each round in another order, then prepares ours.

    Where the clock is not the host's, ours is timed here as well.
    """

    def __init__(self, ours: Provider, peers: Sequence[Provider], clock: Clock) -> None:
        self.ours, self.clock = ours, clock
        self.timed = list(peers) if clock.is_host else [ours, *peers]
        self.times: dict[str, list[float]] = {provider.name: [] for provider in self.timed}
        self._round = 0

    def __call__(self) -> None:
        shift = self._round % max(len(self.timed), 1)
        for provider in self.timed[shift:] + self.timed[:shift]:
            self.times[provider.name].append(self.seconds(provider))
        self._round += 1
        if self.ours.prepare:
            self.ours.prepare()

    def seconds(self, provider: Provider) -> float:
        """The time of one call, prepared beforehand."""
        if provider.prepare:
            provider.prepare()
        return self.clock.seconds(provider.call)

    def round_seconds(self) -> float:
        """The time of one whole round, ours included, measured once and not kept."""
        return sum(map(self.seconds, {provider.name: provider for provider in [self.ours, *self.timed]}.values()))


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


def run(
    benchmark: Any, case: Case, providers: Sequence[Provider], work: Work, settings: Settings, *, trains: bool = False
) -> None:
    """Check and time ``providers`` (the first is ours) and write the row of ``case`` into ``benchmark.extra_info``.

    trains: the calls need gradients; else they run in inference mode.
    """
    ours, *peers = chosen(providers, settings.providers)
    with mode(case, trains), skip_when_exhausted(case.id):
        for provider in (ours, *peers):
            if provider.prepare:
                provider.prepare()
            check(f"{case.id}: {provider.name}", provider.call(), provider.expected)
        peaks = {p.name: call_peak(p.call, case.device) for p in (ours, *peers) if p.role != "floor"}
        clock = clock_of(case.device)
        ours, *peers = [replace(provider, call=clock.ready(provider.call)) for provider in (ours, *peers)]
        hook = Interleaved(ours, peers, clock)
        rounds = choose_rounds(hook.round_seconds(), settings)
        benchmark.group = case.suite
        benchmark.pedantic(ours.call, setup=hook, rounds=rounds)
        if benchmark.disabled:
            return
        rate, bandwidth = floors.rates(DTYPES.get(case.dtype, torch.float32), case.device)
    samples = {ours.name: list(benchmark.stats.stats.data), **hook.times}
    medians = {name: statistics.median(times) for name, times in samples.items()}
    floor = floors.floor_seconds(work.flops, work.traffic, rate, bandwidth)
    row = account({p.name: p.role for p in (ours, *peers)}, medians, work, floor)
    for name, times in samples.items():
        lower, _, upper = statistics.quantiles(times, n=4, method="inclusive")
        row["providers"][name] |= {"lower_quartile": lower, "upper_quartile": upper, "peak": peaks.get(name)}
    ceilings = {"matrix_rate": rate, "bandwidth": bandwidth}
    benchmark.extra_info.update(describe(case, settings), rounds=rounds, **ceilings, **row)


def chosen(providers: Sequence[Provider], names: Sequence[str]) -> list[Provider]:
    """Ours, and those of the others whose names were asked for (of the dense ones at least the first)."""
    ours, *peers = providers
    if not names:
        return [ours, *peers]
    kept = [peer for peer in peers if peer.name in names]
    dense = [peer for peer in peers if peer.role == "dense"][:1]
    return [ours, *([] if any(peer.role == "dense" for peer in kept) else dense), *kept]


@contextlib.contextmanager
def mode(case: Case, trains: bool) -> Iterator[None]:
    """Inference mode unless the case trains; on a GPU float32 is not rounded to TF32, for anybody."""
    with float32_products(False), contextlib.nullcontext() if trains else torch.inference_mode():
        yield


def describe(case: Case, settings: Settings) -> dict[str, Any]:
    """What every row says about itself: the case, the machine, versions, threads, allocator."""
    return {
        "case": case.id,
        "suite": case.suite,
        "shape": case.shape,
        "batch": case.batch,
        "mix": case.mix,
        "dtype": case.dtype,
        "device": case.device,
        **settings.environment,
    }
