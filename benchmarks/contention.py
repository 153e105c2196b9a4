"""A network beside one other busy process: ``python -m benchmarks.contention CASE SECONDS THREADS``.

CASE is `harness.Case` as JSON; printed is, as JSON, what `measured` gives. The program has a process of its own, which
keeps itself, and the busy one, to as many cores as it has threads: so there is somebody in the way on every machine.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from den.support.call_time import keep_allocations_on_the_heap

from .harness import REST, Case, Provider, Settings, check

ROUNDS = 7
COMPARED = ("ours", "dense-folded", "dense-openvino", "dense-onnxruntime")
# Idle until it reads a byte, then busy until there is one more; each is answered. It ends with whoever writes to it.
LOOP = """import os, select
while os.read(0, 1):
    os.write(1, b".")
    while not select.select([0], [], [], 0)[0]:
        sum(range(10000))
    if not os.read(0, 1):
        break
    os.write(1, b".")
"""


class Busy:
    """A child process that keeps one core busy, with nothing useful, between `start` and `stop`."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self.child = child

    def _toggle(self) -> None:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(b".")
        if not self.child.stdout.read(1):
            raise RuntimeError("contention: the busy process must run until it is told to end, but it has ended")

    start = stop = _toggle


@contextlib.contextmanager
def busy_process() -> Iterator[Busy]:
    """A `Busy` that is idle at first, and is ended whatever happens; if we are killed, it ends by itself."""
    command, pipe = [sys.executable, "-S", "-c", LOOP], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0) as child:
        try:
            yield Busy(child)
        finally:
            child.kill()


@dataclass
class Times:
    """Seconds of a provider's calls, alone and beside the busy process."""

    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Medians, their ratio `growth`, and that of the means."""
        alone, beside = statistics.median(self.alone), statistics.median(self.beside)
        means = statistics.fmean(self.beside) / statistics.fmean(self.alone)
        return {"alone": alone, "beside": beside, "growth": beside / alone, "mean_growth": means}


def block(provider: Provider, seconds: float) -> list[float]:
    """The times of calls one after the other, for that long and at least one, after one that is not timed."""
    provider.call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        provider.call()
        times.append(time.perf_counter() - start)
    return times


def measured(providers: Sequence[Provider], seconds: float, rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """For each provider, checked beforehand, the `Times.summary` of its calls in all rounds.

    seconds: of each provider's calls alone, and of those beside the busy process, in all rounds together. A round has
    both from every provider, in another order each time, with a rest between them: no thread of one disturbs another.
    """
    found = {provider.name: Times() for provider in providers}
    with torch.inference_mode(), busy_process() as busy:
        for provider in providers:
            check(provider.name, provider.call(), provider.expected)
        for turn in range(rounds):
            shift = turn % len(providers)
            for provider in [*providers[shift:], *providers[:shift]]:
                time.sleep(REST)
                found[provider.name].alone += block(provider, seconds / rounds)
                busy.start()
                found[provider.name].beside += block(provider, seconds / rounds)
                busy.stop()
    return {name: times.summary() for name, times in found.items()}


def providers_of(case: Case, engines: Sequence[str]) -> list[Provider]:
    """Ours, frozen, with selector and plan; the dense network in PyTorch, bn folded, and on the engines."""
    from .elastic_network import ElasticNetwork
    from .test_bench_network import dense_providers, elastic_providers

    with torch.no_grad():
        network = ElasticNetwork.make(case)
        settings = Settings(compile="none", engines=tuple(engines))
        made = [*elastic_providers(network), *dense_providers(case, network, settings)]
    return sorted((p for p in made if p.name in COMPARED), key=lambda provider: COMPARED.index(provider.name))


def keep_to(threads: int) -> None:
    """Let torch use that many threads, and this process and its children as many cores, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure the case of the command line."""
    from . import engines

    case, seconds, threads = Case(**json.loads(arguments[0])), float(arguments[1]), int(arguments[2])
    keep_to(threads)  # before any thread starts
    keep_allocations_on_the_heap()
    return measured(providers_of(case, engines.installed()), seconds)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
