"""Bodies of requests: read within bounds, as a picture or as JSON that holds one; what does not fit is refused."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from den.serve.network import TOP

KEYS = ("image", "task", "top")
MOST_TOP = 1_000


class Refused(Exception):
    """A request that is not answered, with the HTTP status and the reason."""

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, dict(headers or {})


@dataclass(frozen=True)
class Asked:
    """A picture, and what is to be told of it."""

    picture: bytes = field(repr=False)
    task: str | None  # None: all
    top: int = TOP


async def asked(request: Request, most: int) -> Asked:
    """Read what a request asks for; Refused for a body above `most` bytes, of another type, or of something else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and kind != "application/octet-stream" and not kind.startswith("image/"):
        raise Refused(
            415,
            "Content-Type must be image/*, application/octet-stream or application/json, got "
            f"{repr(kind) if kind else 'none'}",
            {"Accept": "image/*, application/octet-stream, application/json"},
        )
    body = await _body(request, most)
    named = request.path_params.get("task")
    if kind == "application/json":
        return _of_json(body, named)
    query = request.query_params
    if unknown := set(query) - {"task", "top"}:
        raise Refused(422, f"parameters must be among task and top, got {', '.join(sorted(unknown))}")
    return Asked(body, named or query.get("task"), _top(query.get("top", str(TOP))))


async def _body(request: Request, most: int) -> bytes:
    """A body, read no further than it may be long."""
    too_large = Refused(413, f"body must have at most {most:,} bytes, got more")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > most):
        raise too_large
    parts = bytearray()
    async for part in request.stream():
        parts += part
        if len(parts) > most:
            raise too_large
    return bytes(parts)


def _of_json(body: bytes, named: str | None) -> Asked:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "body must be JSON, got something else") from None
    if not isinstance(values, dict) or set(values) - set(KEYS) or not isinstance(values.get("image"), str):
        got = ", ".join(map(repr, values)) if isinstance(values, dict) else type(values).__name__
        raise Refused(
            422, f'body must be {{"image": BASE64}}, with "task" and "top" where they are wanted, got {got[:200]}'
        )
    task = values.get("task")
    if task is not None and not isinstance(task, str):
        raise Refused(422, f"task must be a name, got {type(task).__name__}")
    if named is not None and task is not None and task != named:
        raise Refused(422, f"task must be that of the address, {named!r}, or be left out, got {task!r}")
    try:
        picture = base64.b64decode(values["image"], validate=True)
    except ValueError:
        raise Refused(422, "image must be base64, got something else") from None
    return Asked(picture, named or task, _top(values.get("top", TOP)))


def _top(value: Any) -> int:
    """The number of classes of an answer, of a string or a number."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 6:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_TOP:
        raise Refused(422, f"top must be a whole number in 1..{MOST_TOP}, got {str(value)[:20]!r}")
    return value
