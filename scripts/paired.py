#!/usr/bin/env python3
"""Times one operation after the other of two trees of this project, built in place, in turns: is the new one slower?

    scripts/paired.py OLD NEW [CASE ...] [--restarts 7]

A case is KIND-CHANNELS-SIZE-BATCH-DTYPE, such as conv-64-32-8-float32; without any the list below is run. Each tree
has a process of its own on one thread; the two answer in turns, and each pair of processes is started anew several
times, because where a process puts its memory changes times by more than one per cent. Printed is the median over the
restarts of new time / old time, where a time is the lower quartile of 14 measurements, with the smallest and the
largest ratio. Real-time priority is taken where it is allowed. Nothing else should run meanwhile.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

CASES = [
    "conv-16-16-1-float32", "conv-16-4-1-float32", "conv-64-32-8-float32", "conv-128-16-8-float32",
    "conv-128-16-32-bfloat16", "conv-24-16-4-float16", "norm-64-32-8-float32", "block-16-32-1-float32",
    "block-64-32-8-float32", "block-128-16-8-bfloat16", "bottleneck-16-8-1-float32", "bottleneck-64-16-4-float32",
    "training-16-16-8-float32", "training-64-16-8-float32", "plan-6-1-64-float32",
]  # fmt: skip


def serve() -> None:
    """Answer each line "CASE CALLS" of the standard input with the seconds that a call took."""
    cases: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        name, calls = line.split()
        if name not in cases:
            cases[name] = make(name)
        run = cases[name]
        start = time.perf_counter()
        for _ in range(int(calls)):
            run()
        print((time.perf_counter() - start) / int(calls), flush=True)


def make(name: str) -> Callable[[], object]:
    """The call that a case times, on weights and levels that depend on the case alone."""
    import torch

    from den.nn.blocks.bottleneck import BottleneckBlock, BottleneckShape
    from den.nn.blocks.residual import ElasticBlock
    from den_kernels import DynamicBatchNorm2d, DynamicConv2d, RoutingPlan

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    kind, *numbers, dtype_name = name.split("-")
    channels, size, batch = map(int, numbers)
    dtype, channels_last = getattr(torch, dtype_name), torch.channels_last
    generator = torch.Generator().manual_seed(0)
    levels = ((torch.arange(batch) + 2) % 5)[torch.randperm(batch, generator=generator)].int()
    if kind == "plan":
        stacked = levels[:, None].repeat(1, channels)
        return lambda: RoutingPlan.from_levels(stacked, 4)

    inputs = 4 * channels if kind == "bottleneck" else channels
    x = torch.randn(batch, inputs, size, size, generator=generator).to(dtype).contiguous(memory_format=channels_last)
    route = RoutingPlan.from_levels(levels[:, None], 4)[0]
    if kind in ("conv", "training"):
        module = DynamicConv2d(channels, channels, 3, padding=1, bias=False, out_groups=4, in_groups=4)
    elif kind == "norm":
        module = DynamicBatchNorm2d(channels, groups=4)
    elif kind == "block":
        module = ElasticBlock(channels, channels, 5)
    elif kind == "bottleneck":
        module = BottleneckBlock(BottleneckShape(inputs, channels, inputs, size, 1), 5)
    else:
        raise SystemExit(f"paired.py: the kind of {name} must be conv, training, norm, block, bottleneck or plan")
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    module = module.to(dtype, memory_format=channels_last) if kind != "norm" else module
    if kind != "training":
        module.eval()
        return lambda: module(x, route)
    gradient = torch.randn(x.shape, generator=generator).to(dtype).contiguous(memory_format=channels_last)
    x.requires_grad_(True)

    def step() -> object:
        with torch.enable_grad():
            return torch.autograd.grad(module(x, route), [x, module.weight], gradient)

    return step


class Server:
    """A process that times cases in a tree."""

    def __init__(self, tree: str) -> None:
        core = str(max(os.sched_getaffinity(0)))
        pinned = ["chrt", "-f", "50"] if may_hurry() else []
        # Memory that is never given back to the system makes no page faults while it is timed.
        memory = {
            "MALLOC_MMAP_THRESHOLD_": str(2**32),
            "MALLOC_TRIM_THRESHOLD_": str(2**33),
            "MALLOC_TOP_PAD_": "268435456",
        }
        self.process = subprocess.Popen(
            [*pinned, "taskset", "-c", core, sys.executable, os.path.abspath(__file__), "--serve"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree,
            env={**os.environ, **memory, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.abspath(tree)},
        )  # fmt: skip

    def time(self, case: str, calls: int) -> float:
        """Seconds of a call, the mean of so many."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{case} {calls}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"paired.py: {case} ended the process of {self.process.args[-1]}")
        return float(answer)


def may_hurry() -> bool:
    """Return True where real-time priority is allowed."""
    try:
        return subprocess.run(["chrt", "-f", "50", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def compare(old: Server, new: Server, case: str) -> tuple[float, float]:
    """Seconds of a call of both, measured in turns: the lower quartiles of 14."""
    seconds = max(server.time(case, 3) for server in (old, new))
    calls = max(1, int(0.03 / seconds))
    times: dict[Server, list[float]] = {old: [], new: []}
    for turn in range(14):
        for server in (old, new) if turn % 2 else (new, old):
            times[server].append(server.time(case, calls))
    first, second = (statistics.quantiles(times[server], n=4)[0] for server in (old, new))
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--restarts", type=int, default=7)
    arguments = parser.parse_args()
    results: dict[str, list[tuple[float, float]]] = {case: [] for case in arguments.cases}
    for _ in range(arguments.restarts):
        old, new = Server(arguments.old), Server(arguments.new)
        for case in arguments.cases:
            results[case].append(compare(old, new, case))
        for server in (old, new):
            server.process.kill()
    for case, pairs in results.items():
        ratios = [new / old for old, new in pairs]
        old, new = (statistics.median(column) * 1e6 for column in zip(*pairs, strict=True))
        middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
        print(f"{case:28} {old:9.1f} {new:9.1f} us   new / old {middle:.3f}   ({least:.3f} to {most:.3f})")


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
