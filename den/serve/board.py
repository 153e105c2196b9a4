"""A board on which replicas tell each other: their metrics, and whether the service ends.

Prometheus asks one address and is answered by one replica; on the board lie the metrics of all of them.
"""

import time

from den.serve.metrics import merged

PERIOD = 0.5  # seconds between two reports of a replica
LOST = 20.0  # seconds without a report, after which a replica is taken for ended


class Board:
    """The last report of each replica; on Ray an actor."""

    def __init__(self) -> None:
        self._reports: dict[str, tuple[float, str, int]] = {}
        self._ending = 0.0  # since when

    def report(self, replica: str, text: str, held: int) -> bool:
        """Take a replica's metrics and the number of requests that it holds; returns True where the service ends."""
        self._reports[replica] = (time.monotonic(), text, held)
        return bool(self._ending)

    def text(self) -> str:
        """The metrics of all replicas, each with its name as a label."""
        return merged({name: text for name, (_, text, _) in sorted(self._current().items())})

    def end(self) -> None:
        """Tell every replica, with its next report, to take no more requests."""
        self._ending = self._ending or time.monotonic()

    def idle(self) -> bool:
        """Return True where every replica has learnt that the service ends, and holds no request."""
        learnt = self._ending + PERIOD
        return bool(self._ending) and all(at > learnt and not held for at, _, held in self._current().values())

    def _current(self) -> dict[str, tuple[float, str, int]]:
        now = time.monotonic()
        return {name: report for name, report in self._reports.items() if now - report[0] < LOST}
