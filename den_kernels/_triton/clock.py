"""Times of GPU work, for the tuner and the benchmarks. No op measures time when it runs."""

import statistics
import time
from collections.abc import Callable

import torch

_HEAD_START = 200_000  # cycles, some 0.1 ms: the host puts events and launches in the queue meanwhile


def recorded(call: Callable[[], object], device: torch.device, times: int = 1) -> Callable[[], object]:
    """`times` calls as one: on a GPU a captured graph, so that what the host does between launches is not timed."""
    if device.type != "cuda":
        return lambda: [call() for _ in range(times)]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph.replay


def elapsed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: by events of the device, or the clock on a CPU.

    The device is kept busy until the call is in its queue, so that it does not wait for the host after the first event.
    """
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def median_seconds(call: Callable[[], object], device: torch.device, rounds: int = 15, times: int = 4) -> float:
    """Median over `rounds` of the seconds of one call, each the mean of `times` calls in a row."""
    repeated = recorded(call, device, times)
    repeated()
    return statistics.median(elapsed(repeated, device) for _ in range(rounds)) / times
