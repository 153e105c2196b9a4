"""Streams and events of the simulated GPU. Every operation has run when it returns; these tell what might not have.

An operation on a stream comes after earlier ones there and after what the stream waited for. Whoever reads memory that
another stream wrote, without having waited, has read it too early.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from itertools import count
from typing import ClassVar

from torch import Tensor


class Stream:
    """`torch.cuda.Stream`."""

    numbers: ClassVar[count] = count(1)
    current: ClassVar["Stream"]
    latest: ClassVar[Counter] = Counter()  # stream -> operations that there were
    finished: ClassVar[Counter] = Counter()  # stream -> operations that the host has waited for

    def __init__(self, device: object = None, **_: object) -> None:
        self.cuda_stream = next(self.numbers)
        self.passed: Counter = Counter()  # stream -> operations that come before the next one here

    def advance(self) -> tuple[int, int]:
        """One more operation; its place."""
        place = self.passed[self.cuda_stream] = self.latest[self.cuda_stream] = self.latest[self.cuda_stream] + 1
        return self.cuda_stream, place

    def knows(self, place: tuple[int, int]) -> bool:
        """Whether an operation has run when the next one here does."""
        stream, operation = place
        return max(self.passed[stream], self.finished[stream]) >= operation

    def record_event(self, event: "Event | None" = None) -> "Event":
        """An event behind everything so far."""
        event = event or Event()
        event.passed = self.passed.copy()
        return event

    def wait_event(self, event: "Event") -> None:
        """What comes next waits for the event."""
        self.passed |= event.passed

    def wait_stream(self, other: "Stream") -> None:
        """What comes next waits for all of the other."""
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        """The host waits."""
        self.record_event().synchronize()


def synchronize(device: object = None) -> None:
    """`torch.cuda.synchronize`."""
    Stream.finished |= Stream.latest


class Event:
    """`torch.cuda.Event`."""

    def __init__(self, enable_timing: bool = False, **_: object) -> None:
        self.timed = enable_timing
        self.passed: Counter = Counter()

    def record(self, stream: Stream | None = None) -> None:
        """Behind everything so far on the stream."""
        (stream or Stream.current).record_event(self)

    def wait(self, stream: Stream | None = None) -> None:
        """The stream waits for it."""
        (stream or Stream.current).wait_event(self)

    def synchronize(self) -> None:
        """The host waits for it."""
        Stream.finished |= self.passed

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds, made up."""
        assert self.timed
        assert end.timed
        return 0.25


@contextlib.contextmanager
def on(stream: Stream) -> Iterator[None]:
    """`torch.cuda.stream`."""
    before, Stream.current = Stream.current, stream
    try:
        yield
    finally:
        Stream.current = before


class Writes:
    """Who wrote which memory last."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[int, int]] = {}

    def check(self, name: str, values: list[Tensor]) -> None:
        """RuntimeError where the current stream reads what another may not have written yet."""
        for each in values:
            place = self._places.get(each.untyped_storage().data_ptr())
            if place is not None and not Stream.current.knows(place):
                raise RuntimeError(f"{name}: stream {Stream.current.cuda_stream} reads before stream {place[0]} wrote")

    def note(self, values: list[Tensor]) -> None:
        """The current stream writes."""
        place = Stream.current.advance()
        self._places |= {each.untyped_storage().data_ptr(): place for each in values}
