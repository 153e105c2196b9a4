"""What a cache owes to the streams of a GPU: a value built on one of them is read on all.

- Another stream that reads a value waits for the event behind its building, once.
- Memory that another stream read is not given to somebody else before that stream is done, though the cache forgets it.
- Nothing is built while a CUDA graph is captured: eager calls would find in the cache what only a replay computes. That
  is an error; run the network once before capturing, or freeze it.
- A value that a graph read while captured is kept as long as the cache. So the graph goes on to compute with the value
  of its capture, while it sees new contents of tensors that it reads where they are, like the weights of convolutions:
  whoever changes weights or running statistics captures anew.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Value = TypeVar("Value")


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in a value: itself, those of a module, of a dataclass's fields, of the items of a collection."""
    if isinstance(value, Tensor):
        yield value
        return
    parts: Any = ()
    if isinstance(value, nn.Module):
        parts = (*value.parameters(), *value.buffers())
    elif isinstance(value, (tuple, list, dict)):
        parts = value.values() if isinstance(value, dict) else value
    elif is_dataclass(value):
        parts = (getattr(value, field.name) for field in fields(value))
    for part in parts:
        yield from tensors_of(part)


class _Built(NamedTuple):
    """What was built on one GPU."""

    device: torch.device
    tensors: list[Tensor]
    done: Any  # the event behind it
    streams: set[int]  # those that may read it
    captured: list[bool]  # whether a graph reads it: empty or not


class StreamGuard:
    """Stands between the value of a cache and the streams that read it; does nothing on a CPU.

    `value = guard.build(sources, build)` in place of `build()`, and `guard.use()` before the value is handed out.
    """

    def __init__(self) -> None:
        self._built: list[_Built] = []
        self._captured: list[list[Tensor]] = []

    def build(self, sources: tuple[Tensor, ...], build: Callable[[], Value]) -> Value:
        """What `build` makes of `sources`; a RuntimeError where these lie on a GPU that captures a graph."""
        self._built = []
        on_gpu = any(source.device.type == "cuda" for source in sources)
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "den_kernels: folded weights must be there before a CUDA graph is captured, got new or changed weights "
                "inside the capture; run the network once before capturing, or freeze() it"
            )
        value = build()
        if on_gpu:
            self._built = list(_mark(value))
        return value

    def use(self) -> None:
        """Let the current stream read the value, whatever happens to it afterwards."""
        for built in self._built:
            if torch.cuda.is_current_stream_capturing():  # it may not wait for work outside; that is done by now
                self._keep(built)
                continue
            stream: Any = torch.cuda.current_stream(built.device)
            if stream.cuda_stream not in built.streams:
                stream.wait_event(built.done)
                for tensor in built.tensors:
                    tensor.record_stream(stream)
                built.streams.add(stream.cuda_stream)

    def _keep(self, built: _Built) -> None:
        if not built.captured:
            built.captured.append(True)
            self._captured.append(built.tensors)


def _mark(value: Any) -> Iterator[_Built]:
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors_of(value):
        if tensor.device.type == "cuda":
            by_device.setdefault(tensor.device, []).append(tensor)
    for device, tensors in by_device.items():
        stream: Any = torch.cuda.current_stream(device)
        yield _Built(device, tensors, stream.record_event(), {stream.cuda_stream}, [])
