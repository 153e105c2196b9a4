"""Duties of a cache to the streams of a GPU: a value built on one of them is read on all.

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
from typing import Any, Generic, NamedTuple, TypeVar

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
    """The tensors of a value on one GPU."""

    device: torch.device
    tensors: list[Tensor]
    done: Any  # the event behind it
    streams: set[int]  # those that may read it


def _mark(value: Any) -> Iterator[_Built]:
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors_of(value):
        if tensor.device.type == "cuda":
            by_device.setdefault(tensor.device, []).append(tensor)
    for device, tensors in by_device.items():
        stream: Any = torch.cuda.current_stream(device)
        yield _Built(device, tensors, stream.record_event(), {stream.cuda_stream})


class Guarded(Generic[Value]):
    """A value made by ``build()`` of tensors on a GPU, for all its streams.

    ``captured`` is a list of the cache, as long-lived as that: values that a graph reads are put there. Raises
    RuntimeError while a graph is captured.
    """

    def __init__(self, build: Callable[[], Value], captured: list[Any]) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "den_kernels: folded weights must be there before a CUDA graph is captured, got new or changed weights "
                "inside the capture; run the network once before capturing, or freeze() it"
            )
        self._value, self._captured = build(), captured
        self._built = list(_mark(self._value))

    def get(self) -> Value:
        """The value, which the current stream may read even if the cache forgets it meanwhile."""
        self._share()
        return self._value

    def _share(self) -> None:
        if torch.cuda.is_current_stream_capturing():  # it may not wait for work outside, which is done by now
            if not any(value is self._value for value in self._captured):
                self._captured.append(self._value)
            return
        for built in self._built:
            stream: Any = torch.cuda.current_stream(built.device)
            if stream.cuda_stream not in built.streams:
                stream.wait_event(built.done)
                for tensor in built.tensors:
                    tensor.record_stream(stream)
                built.streams.add(stream.cuda_stream)
