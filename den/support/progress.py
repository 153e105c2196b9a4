"""Progress of long work on stderr: a bar on a terminal; elsewhere, as in a job's log, a line of text now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECONDS = 60.0  # between two lines of text


class Progress:
    """A count of work done, shown as a bar on a terminal and as lines of text elsewhere.

    A stream that takes no more text (closed, reader gone, disk full) ends the display, never the work.

    Args:
        total: units of work in all; 0: not known yet, the attribute may be set later.
        name: the work, in a word or two.
        unit: name of one unit.
        initial: units done before.
        shown: False displays nothing.
        leave: True leaves the bar on the terminal when it is closed.
    """

    def __init__(
        self, total: int, name: str, *, unit: str = "it", initial: int = 0, shown: bool = True, leave: bool = True
    ) -> None:
        self.total, self.done, self._name, self._unit, self._note = total, initial, name, unit, ""
        self._stream: Any = sys.stderr if shown else None
        self._bar: tqdm | None = None
        self._last, self._told = time.monotonic(), -1
        with self._telling():
            if self._stream is not None and self._stream.isatty():
                self._bar = tqdm(
                    total=total or None, initial=initial, desc=name, unit=unit, unit_scale=unit == "byte", leave=leave,
                    dynamic_ncols=True, file=self._stream,
                )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Add `count` units of work done."""
        self.done += count
        with self._telling():
            if self._bar is not None:
                self._bar.total = self.total or None
                self._bar.update(count)
            elif self._stream is not None and time.monotonic() - self._last >= SECONDS:
                self._tell()

    def note(self, text: str, *, refresh: bool = True) -> None:
        """Show `text` behind the count; without `refresh` with the next update."""
        self._note = text
        with self._telling():
            if self._bar is not None:
                self._bar.set_postfix_str(text, refresh=refresh)

    def reset(self) -> None:
        """Set the count back to 0."""
        self.done = 0
        with self._telling():
            if self._bar is not None:
                self._bar.reset()

    def close(self) -> None:
        """Close the bar, or print the final count where a line has been printed before."""
        with self._telling():
            if self._bar is not None:
                self._bar.close()
            elif self._stream is not None and 0 <= self._told < self.done:
                self._tell()
        self._stream, self._bar = None, None

    def _tell(self) -> None:
        self._last, self._told = time.monotonic(), self.done
        of = f" of {self.total:,}" if self.total else ""
        unit = "" if self._unit == "it" else f" {self._unit}s"
        print(f"{self._name}: {self.done:,}{of}{unit}{self._note and f', {self._note}'}", file=self._stream, flush=True)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):
            self._stream, self._bar = None, None


def progress(items: Collection[T], name: str, *, shown: bool = True) -> Iterator[T]:
    """The items, one after the other, with a bar that is gone afterwards."""
    with Progress(len(items), name, shown=shown, leave=False) as bar:
        for item in items:
            yield item
            bar.update()
