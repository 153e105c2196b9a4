"""One case: check every provider against its float64 oracle, time all of them interleaved, account for the work.

pytest-benchmark times ours; the other providers run, and are timed, in the setup hook before each of its rounds, so
that every round holds one call of each and a slow moment of the machine falls on all alike. On a GPU the hook times
ours as well, by events.
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from . import floors
from .allocations import call_peak, skip_when_exhausted
from .clocks import Clock, Timed, clock_of
from .precision import fast_convolutions
from .targets import AUTOTUNED

Role = Literal["ours", "dense", "tuned", "alternative", "floor"]
Result = Tensor | Sequence[Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TF32 = "tf32"  # the dtype of a case whose products of float32 may be rounded to TF32, on a GPU
# "dense" is what anybody can run: the network in nn.Conv2d, eager, bn folded, compiled, or on an inference engine;
# "tuned" is on PyTorch's private prepacked operators, or a whole graph on our own kernel; "floor" are the bare
# convolutions of the levels.
PROVIDERS: dict[str, Role] = {
    name: role
    for role, names in {
        "ours": "ours ours-inplace ours-plan ours-layer ours-kernel ours-fused ours-composed",
        "dense": "dense-eager dense-folded dense-compiled dense-whole dense-openvino dense-onnxruntime",
        "tuned": "dense-packed ours-whole",
        "alternative": "masked bucket per-instance grouped one-by-one one-by-one-whole",
        "floor": "bare bare-packed",
    }.items()
    for name in names.split()
}
REST = 0.02  # seconds: GNU OpenMP's threads wait for work in a loop for half of it, others' for less


@dataclass(frozen=True)
class Case:
    """The setting that all providers compute, and where."""

    suite: str  # "residual", "conv-out-elastic", ...
    shape: str  # "64x32x32", "wrn32_4"
    batch: int
    mix: str  # how the levels are drawn
    dtype: str
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the maps and the weights."""
        return DTYPES.get(self.dtype, torch.float32)

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
    """One way to compute a case. ``prepare`` runs before each call and is not timed.

    again: the same on other inputs, for a GPU, whose cache would hold those of one call.
    runtime: whose threads compute it.
    precision: the name of the dtype that it computes in, where that is not the dtype of the case.
    """

    name: str  # one of PROVIDERS
    call: Callable[[], Result]
    expected: Expected
    prepare: Callable[[], object] | None = None
    again: Sequence[Callable[[], object]] = ()
    runtime: str = "torch"
    precision: str | None = None

    @property
    def role(self) -> Role:
        """Role of the provider, by its name."""
        return PROVIDERS[self.name]


@dataclass(frozen=True)
class Work:
    """Cost of a case: FLOPs with the chosen levels, at full structure, and the bytes that any provider must move."""

    flops: float
    dense_flops: float
    traffic: float


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark run: time for a case, which providers, how the dense ones are compiled."""

    seconds: float = 1.0
    least_rounds: int = 7
    most_rounds: int = 51
    compile: Literal["none", "network", "all"] = "network"
    autotune: bool = False  # on a GPU: compiled once more, kernels searched for, which takes long
    providers: tuple[str, ...] = ()  # none: all; else only these beside ours
    engines: tuple[str, ...] = ()  # inference engines that also run the dense networks: engines.installed()
    environment: dict[str, Any] = field(default_factory=dict)  # versions, threads, allocator: copied into every row


def provide(
    calls: Mapping[str, Callable[..., Result]],
    expected: Expected,
    whole: Expected | None = None,
    inputs: Sequence[Any] | None = None,
) -> list[Provider]:
    """A provider for each call; those that compute the full structure are expected to give `whole`.

    inputs: what they are called with; the first is checked, all are timed on a GPU. None: they take nothing.
    """
    found = []
    for name, call in calls.items():
        first, *again = [call] if inputs is None else [functools.partial(call, each) for each in inputs]
        is_whole = name.startswith("dense") or name.endswith("whole")
        found.append(Provider(name, first, whole if whole and is_whole else expected, again=again))
    return found


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
        error = max(_error(exact, rounded), max(torch.finfo(dtype).eps / 2, least / factor) * _size(exact))
        return Expected(joined(exact), factor * error)
    errors = [_error(e, r) for e, r in zip(exact, rounded, strict=True)]
    sizes = [_size(e) for e in exact]
    usual = statistics.median([error / size for error, size in zip(errors, sizes, strict=True) if size] or [0.0])
    least = max(usual, torch.finfo(dtype).eps / 2, least / factor)
    allowed = [factor * max(error, least * size) for error, size in zip(errors, sizes, strict=True)]
    parts = [torch.full((e.numel(),), bound, dtype=torch.float64) for e, bound in zip(exact, allowed, strict=True)]
    return Expected(joined(exact), torch.cat(parts) if parts else 0.0)


def _size(exact: Tensor) -> float:  # of any shape
    return exact.detach().abs().max().item() if exact.numel() else 0.0


def _error(exact: Tensor, rounded: Tensor) -> float:  # of one shape
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

    Where the clock is not the host's, ours is timed here as well. Before threads of another runtime compute, those of
    the last one come to rest. Where there is more than one runtime, every short call is made once untimed before it is
    timed, whoever came before: that wakes threads and fills caches, and nobody pays for who was timed before it.
    """

    def __init__(self, ours: Provider, peers: Sequence[Provider], clock: Clock) -> None:
        self.ours, self.clock = ours, clock
        self.ready: dict[str, Timed] = {p.name: clock.ready([p.call, *p.again]) for p in (ours, *peers)}
        self.timed = list(peers) if clock.is_host else [ours, *peers]
        self.times: dict[str, list[float]] = {provider.name: [] for provider in self.timed}
        self._round, self._runtime = 0, ours.runtime
        self._wakes = len({provider.runtime for provider in (ours, *peers)}) > 1
        self._least: dict[str, float] = {}  # the shortest time of each so far

    def __call__(self) -> None:
        shift = self._round % max(len(self.timed), 1)
        for provider in self.timed[shift:] + self.timed[:shift]:
            self.times[provider.name].append(self.seconds(provider))
        self._round += 1
        self.settle(self.ours)
        if self.ours.prepare:
            self.ours.prepare()

    def seconds(self, provider: Provider) -> float:
        """The time of one call, prepared beforehand, the mean over its sets of inputs."""
        self.settle(provider)
        if provider.prepare:
            provider.prepare()
        taken = self.clock.seconds(self.ready[provider.name])
        self._least[provider.name] = min(taken, self._least.get(provider.name, taken))
        return taken

    def settle(self, provider: Provider) -> None:
        """Wait until no thread of another runtime is busy, and wake the provider's own."""
        if provider.runtime != self._runtime:
            self._runtime = provider.runtime
            time.sleep(REST)
        if self._wakes and self._least.get(provider.name, 0.0) < REST:  # for a long call, waking is nothing
            if provider.prepare:
                provider.prepare()
            provider.call()

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


def account(times: dict[str, float], work: Work, floor: float) -> dict[str, Any]:
    """The arithmetic of a row: median seconds by provider to ratios, fractions and overheads.

    Overhead is what a provider costs above the faster of those of role "floor".
    """
    by_role = {role: [name for name in times if PROVIDERS[name] == role] for role in ("dense", "tuned", "floor")}
    tuned = best(times, by_role["dense"] + by_role["tuned"])
    dense, bare, ratio = best(times, by_role["dense"]), best(times, by_role["floor"]), flops_ratio(work)
    providers: dict[str, dict[str, Any]] = {}
    for name, seconds in times.items():
        providers[name] = {"role": PROVIDERS[name], "median": seconds, "floor_share": floor / seconds}
        if dense is not None:
            providers[name]["dense_share"] = seconds / times[dense]
            providers[name]["realised"] = realised_fraction(times[dense], seconds, ratio)
            providers[name]["realised_tuned"] = realised_fraction(times[tuned], seconds, ratio)
        if bare is not None and PROVIDERS[name] != "floor" and times[bare] > 0:
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
        counted = [p for p in (ours, *peers) if p.role != "floor" and p.runtime == "torch"]
        peaks = {p.name: call_peak(p.call, case.device) for p in counted}
        if benchmark.disabled:  # everything is right, and compiled
            benchmark(ours.call)
            return
        hook = Interleaved(ours, peers, clock_of(case.device))
        rounds = choose_rounds(hook.round_seconds(), settings)
        benchmark.group = case.suite
        benchmark.pedantic(hook.ready[ours.name].run, setup=hook, rounds=rounds)
        rate, bandwidth = floors.rates(case.dtype, case.device)
    samples = {ours.name: list(benchmark.stats.stats.data), **hook.times}
    medians = {name: statistics.median(times) for name, times in samples.items()}
    floor = floors.floor_seconds(work.flops, work.traffic, rate, bandwidth)
    row = account(medians, work, floor)
    for name, times in samples.items():
        lower, _, upper = statistics.quantiles(times, n=4, method="inclusive")
        row["providers"][name] |= {"lower_quartile": lower, "upper_quartile": upper, "peak": peaks.get(name)}
        if hook.ready[name].graph:
            row["providers"][name]["graph"] = True
    for provider in peers:
        if provider.precision:
            row["providers"][provider.name]["precision"] = provider.precision
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
    """Inference mode unless the case trains; on a GPU float32 is rounded to TF32 for everybody or for nobody."""
    with fast_convolutions(case.dtype == TF32), contextlib.nullcontext() if trains else torch.inference_mode():
        yield


def describe(case: Case, settings: Settings) -> dict[str, Any]:
    """Fields that every row carries: the case, the machine, versions, threads, allocator."""
    return {
        "case": f"{case.id}{AUTOTUNED if settings.autotune else ''}",
        "suite": case.suite,
        "shape": case.shape,
        "batch": case.batch,
        "mix": case.mix,
        "dtype": case.dtype,
        "device": case.device,
        **settings.environment,
    }
