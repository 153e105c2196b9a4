"""The service as an ASGI application: routes, bounds and errors; it runs under Ray Serve and any other ASGI server."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from den.data.decode import TooManyPixels
from den.runs.predict import Prediction, named_task
from den.serve.batcher import Answer, Batcher
from den.serve.bodies import Asked, Refused, asked
from den.serve.metrics import CONTENT_TYPE, Metrics
from den.serve.network import Item, ServedNetwork
from den.serve.settings import Limits

PAGE = {
    "Content-Security-Policy": "default-src 'none'; img-src blob:; connect-src 'self'; style-src 'unsafe-inline';"
    " script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
_log = logging.getLogger("den.serve")
ENDING = "the service ends"
Text = Callable[["Service"], Awaitable[str]]


class Service:
    """One replica: a network, its queue, its counters.

    Args:
        network: what answers.
        limits: bounds of what is taken.
        metrics_text: what /metrics answers; None: the metrics of this replica.

    Attributes:
        held: requests that are read, wait or are computed.
        ending: True sends new requests away; those that are held are answered.
    """

    def __init__(self, network: ServedNetwork, limits: Limits, metrics_text: Text | None = None) -> None:
        self.network, self.limits, self.held, self.ending = network, limits, 0, False
        self.batcher = Batcher(self._computed, limits.batch, limits.wait_ms / 1e3)
        full = network.engine.network.full_flops
        self.metrics = Metrics(full, lambda: len(self.batcher), lambda: self.held)
        self._metrics_text = metrics_text
        self._decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="decode")

    async def predict(self, request: Request) -> Response:
        """Answer POST /predict and /predict/TASK."""
        if self.ending:
            raise Refused(503, ENDING, {"Retry-After": "1", "Connection": "close"})
        if self.held >= self.limits.queue:
            raise Refused(503, f"the queue of {self.limits.queue} requests is full", {"Retry-After": "1"})
        self.held += 1
        began = time.perf_counter()
        try:
            return await self._predict(request, asyncio.get_running_loop().time() + self.limits.seconds, began)
        finally:
            self.held -= 1

    async def _predict(self, request: Request, end: float, began: float) -> Response:
        late = f"within {self.limits.seconds:g} seconds"
        try:
            async with asyncio.timeout_at(end):
                wanted = await asked(request, int(self.limits.body_mb * 1e6))
        except TimeoutError:
            raise Refused(408, f"body must come {late}, got a part of it") from None
        try:
            async with asyncio.timeout_at(end):
                items = await self._items(wanted)
                answers = await self.batcher(items)
        except TimeoutError:
            raise Refused(504, f"the answer did not come {late}", {"Retry-After": "1"}) from None
        self.metrics.answered(answers)
        return JSONResponse(_reply(answers, time.perf_counter() - began))

    async def _items(self, wanted: Asked) -> list[Item]:
        """The picture that is asked about, for each task."""
        tasks = self.network.tasks
        try:
            chosen = range(len(tasks)) if wanted.task is None else [tasks.index(named_task(wanted.task, tasks))]
        except ValueError:
            names = ", ".join(task.name for task in tasks)
            raise Refused(404, f"task must be one of {names}, got {wanted.task[:200]!r}") from None  # type: ignore[index]
        most = int(self.limits.megapixels * 1e6)
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                self._decoders, self.network.decoded, wanted.picture, chosen, wanted.top, most
            )
        except (TooManyPixels, Image.DecompressionBombError) as why:
            raise Refused(413, f"image must have at most {most:,} pixels, got {why}") from None
        except Exception as why:  # Pillow raises exceptions of all kinds on damaged files
            raise Refused(422, f"image must be a picture that can be read, got {_words(why)}") from None

    def _computed(self, items: Any) -> list[Prediction]:
        began = time.perf_counter()
        found = self.network.predictions(items)
        self.metrics.batched(time.perf_counter() - began, found)
        return found

    async def tasks(self, _: Request) -> Response:
        """Answer GET /tasks."""
        network = self.network
        found = [
            {"name": task.name, "size": task.size, "channels": task.channels, "classes": network.classes(k)}
            for k, task in enumerate(network.tasks)
        ]
        engine = network.engine.network
        return JSONResponse({"tasks": found, "blocks": len(engine.blocks), "levels": engine.levels})

    async def text(self, _: Request) -> Response:
        """Answer GET /metrics."""
        text = self.metrics.text() if self._metrics_text is None else await self._metrics_text(self)
        return Response(text, media_type=CONTENT_TYPE)

    async def health(self, _: Request) -> Response:
        """Answer GET /health."""
        if self.ending:
            raise Refused(503, ENDING)
        return PlainTextResponse("ok")

    async def page(self, _: Request) -> Response:
        """Answer GET /."""
        return HTMLResponse(files("den.serve").joinpath("page.html").read_text(encoding="utf-8"), headers=PAGE)

    def counted(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint whose answers are counted, and whose errors are told as JSON."""

        async def answer(request: Request) -> Response:
            try:
                found = await endpoint(request)
            except Refused as why:
                found = _told(why.status, why.reason, why.headers)
            except ClientDisconnect:
                found = _told(400, "the body ended too early")
            except Exception:
                _log.exception("%s failed", request.url.path)
                found = _told(500, "the network failed on this batch; the log has the reason")
            self.metrics.requests.labels(str(found.status_code)).inc()
            return found

        return answer

    async def close(self) -> None:
        """Answer what waits, then end the threads."""
        await self.batcher.close()
        self._decoders.shutdown()


def create_app(
    network: ServedNetwork,
    limits: Limits | None = None,
    *,
    metrics_text: Text | None = None,
    beside: Callable[[Service], Coroutine[Any, Any, None]] | None = None,
) -> Starlette:
    """The service of a network as an ASGI application, for any ASGI server.

    Args:
        limits: bounds of what is taken; None: the defaults.
        metrics_text: what /metrics answers; None: the metrics of this application.
        beside: what runs beside the service as long as it does.
    """
    service = Service(network, limits or Limits(), metrics_text)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        task = None if beside is None else asyncio.create_task(beside(service))
        yield
        if task is not None:
            task.cancel()
        await service.close()

    get = {"/": service.page, "/health": service.health, "/tasks": service.tasks, "/metrics": service.text}
    routes = [Route(path, service.counted(endpoint), methods=["GET"]) for path, endpoint in get.items()]
    predict = service.counted(service.predict)
    routes += [Route(path, predict, methods=["POST"]) for path in ("/predict", "/predict/{task:path}")]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error})
    app.state.service = service
    return app


async def _http_error(_: Request, error: Any) -> Response:
    return _told(error.status_code, error.detail, dict(error.headers or {}))


def _told(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": reason}, status, headers)


def _reply(answers: list[Answer[Prediction]], seconds: float) -> dict[str, Any]:
    """The answer to a request: its predictions, and milliseconds from its first byte."""
    found = [vars(answer.value) for answer in answers]
    return {
        "predictions": [{name: each[name] for name in each if name != "image"} for each in found],  # it had no name
        "milliseconds": {
            "all": round(1e3 * seconds, 3),
            "queue": round(1e3 * max(answer.waited for answer in answers), 3),
            "batch": round(1e3 * max(answer.computed for answer in answers), 3),
        },
        "batch": max(answer.batch for answer in answers),
    }


def _words(error: Exception) -> str:
    """The message of an error in one line, without addresses of memory."""
    text = " ".join(str(error).split())[:200]
    return "a file of none that is read" if " object at 0x" in text else text or type(error).__name__
