"""A queue that makes batches of what is asked for at the same time.

Ours and not Ray Serve's `@serve.batch`, whose queue knows neither bounds nor deadlines: what nobody waits for any more
would still be computed. It also needs Ray, where this one runs under any ASGI server and in tests.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


@dataclass(frozen=True)
class Answer(Generic[Answered]):
    """An answer, with where its time went."""

    value: Answered
    waited: float  # seconds in the queue
    computed: float  # seconds of its batch
    batch: int  # items that were computed together


@dataclass(eq=False)
class _Entry(Generic[Asked, Answered]):
    item: Asked
    came: float
    done: asyncio.Future[Answer[Answered]]


class Batcher(Generic[Asked, Answered]):
    """Answers items in batches, one batch at a time, in a thread of its own.

    A batch is what has come while the one before was computed, in the order in which it came, and at most `most` items.

    Args:
        run: the answers of items, in their order; called in the thread.
        most: items of a batch.
        wait: seconds that a batch waits for more, counted from its first item; 0: it does not.
    """

    def __init__(self, run: Callable[[Sequence[Asked]], Sequence[Answered]], most: int, wait: float = 0.0) -> None:
        self._run, self._most, self._wait = run, most, wait
        self._queue: deque[_Entry[Asked, Answered]] = deque()
        self._came = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._queue)

    async def __call__(self, items: Sequence[Asked]) -> list[Answer[Answered]]:
        """The answers of items, in their order; they may be parts of several batches.

        What is cancelled before its batch begins is not computed. Raises what `run` raises.
        """
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        loop, now = asyncio.get_running_loop(), time.perf_counter()
        entries = [_Entry[Asked, Answered](item, now, loop.create_future()) for item in items]
        self._queue.extend(entries)
        self._came.set()
        return list(await asyncio.gather(*(entry.done for entry in entries)))

    async def close(self) -> None:
        """Answer what waits, then end the thread."""
        self._closing = True
        self._came.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def _work(self) -> None:
        while self._queue or not self._closing:
            if not self._queue:
                self._came.clear()
                await self._came.wait()
                continue
            if self._wait and not self._closing:
                await self._more()
            if batch := self._batch():
                await self._answer(batch)

    async def _more(self) -> None:
        """Wait until a batch is full, or its first item has waited long enough."""
        end = self._queue[0].came + self._wait
        while len(self._queue) < self._most and (left := end - time.perf_counter()) > 0 and not self._closing:
            self._came.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._came.wait(), left)

    def _batch(self) -> list[_Entry[Asked, Answered]]:
        """Take the next batch off the queue, without what nobody waits for any more."""
        batch: list[_Entry[Asked, Answered]] = []
        while self._queue and len(batch) < self._most:
            entry = self._queue.popleft()
            if not entry.done.done():
                batch.append(entry)
        return batch

    async def _answer(self, batch: Sequence[_Entry[Asked, Answered]]) -> None:
        began = time.perf_counter()
        try:
            items = [entry.item for entry in batch]
            values = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, items)
        except Exception as error:  # of one batch: the next one may be well
            for entry in batch:
                if not entry.done.done():
                    entry.done.set_exception(error)
            return
        taken = time.perf_counter() - began
        for entry, value in zip(batch, values, strict=True):
            if not entry.done.done():
                entry.done.set_result(Answer(value, began - entry.came, taken, len(batch)))
