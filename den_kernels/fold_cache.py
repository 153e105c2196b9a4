"""A value derived from tensors, kept until one of them changes."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeVar
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ._extension import extension
from .standing import Standing
from .stream_guard import Guarded

Value = TypeVar("Value")
Source = tuple[Tensor, ...]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_versions = attrgetter("_version")  # in C, for many tensors


class _Epoch:
    """Counters of the events that make every cache forget its value."""

    everywhere = 0  # times that invalidate() was called
    devices = 0  # steps of optimisers, since there are values of tensors that the host cannot look at
    hook: Any = None

    @classmethod
    def count_steps(cls) -> None:
        """Count steps of all optimisers from now on."""
        if cls.hook is None:
            cls.hook = register_optimizer_step_post_hook(cls._step)

    @classmethod
    def _step(cls, *_: object) -> None:
        cls.devices += 1


def invalidate() -> None:
    """Forget all packed and folded weights of all layers and blocks, so that the next call makes them anew.

    Needed only after writes that nothing can notice cheaply: to a few elements of a large weight on a CPU, or to any
    weight on a GPU, through `param.data`, NumPy or another library. Steps of optimisers, `load_state_dict`, in-place
    operations, replaced parameters and writes to most of a weight on a CPU are noticed.
    """
    _Epoch.everywhere += 1


class _Tensors(NamedTuple):
    """The parameters and buffers of modules, and the eps of the batch norms among them, as long as they stand there."""

    modules: tuple[nn.Module, ...]
    standing: Standing
    tensors: Source
    eps: tuple[float, ...]

    @classmethod
    def of(cls, modules: tuple[nn.Module, ...]) -> "_Tensors":
        standing = Standing()
        standing.keep_tree(modules)
        every = [module for each in modules for module in each.modules()]
        norms = [module for module in every if isinstance(module, _NORMS)]
        for norm in norms:
            standing.keep(norm, "eps")
        kept = (entries for module in every for entries in (module._parameters, module._buffers))
        tensors = tuple(tensor for entries in kept for tensor in entries.values() if tensor is not None)
        return cls(modules, standing, tensors, tuple(norm.eps for norm in norms))


class FoldCache(Generic[Value]):
    """Holds what ``build()`` made of ``sources`` while every source is the same tensor with the same values.

    The same tensor: address, sizes, strides, dtype, device and version counter. The counter moves with in-place
    operations and `load_state_dict`, but not with fused optimisers nor with writes through ``param.data`` and NumPy
    arrays. Therefore what a source on a CPU holds is looked at as well, in a microsecond a call: all of it up to 64 KB;
    of a larger one a part in turn that spreads over the whole, so that a change of most of it is noticed at once and
    one of a few elements within some calls (`extension.Watch.turns`). On other devices a step of any optimiser drops
    the value, unless all sources hold integers, which none learns. :func:`invalidate` covers the rest.

    The cache keeps the memory it was built from alive, so no later tensor can take its address. On a GPU all streams
    may read the value, and none is built while a CUDA graph is captured: see `stream_guard`. Copies and pickles of a
    cache are empty.
    """

    def __init__(self) -> None:
        self._entry: tuple[tuple, Any, Source, Value, Guarded[Value] | None] | None = None
        self._captured: list[Any] = []  # values that CUDA graphs read
        self._tensors: _Tensors | None = None

    def get(self, sources: Source, build: Callable[[], Value], *settings: object) -> Value:
        """The value of ``sources`` and ``settings``, built anew if any of them changed since the last call."""
        entry = self._entry
        key = _Epoch.everywhere, settings
        try:
            same = entry is not None and entry[0] == key and entry[1].same(sources)
            watch = None if same else _watch(sources)  # before the value: what is written meanwhile is noticed
        except RuntimeError:  # inference tensors carry no version
            return build()
        if entry is not None and same:
            return entry[3] if entry[4] is None else entry[4].get()
        on_gpu = any(source.device.type == "cuda" for source in sources)
        guard = Guarded(build, self._captured) if on_gpu else None
        value = build() if guard is None else guard.get()
        self._entry = key, watch, tuple(source.detach() for source in sources), value, guard
        return value

    def of(self, modules: tuple[nn.Module, ...], build: Callable[[], Value], *settings: object) -> Value:
        """:meth:`get` of all parameters and buffers of the modules, and of the eps of batch norms among them.

        Where they stand is looked up once for a set of modules, and again when one of them is no longer there
        (parametrizations and pruning move them).
        """
        found = self._tensors
        if found is None or found.modules != modules or not found.standing.holds():
            found = self._tensors = _Tensors.of(modules)
        return self.get(found.tensors, build, *settings, *found.eps)

    def clear(self) -> None:
        """Forget the value."""
        self._entry = self._tensors = None

    def __deepcopy__(self, memo: dict) -> "FoldCache[Value]":
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()


class _DeviceWatch:
    """A watch over tensors of another device than the CPU: they count as changed when any optimiser steps."""

    def __init__(self, sources: Source) -> None:
        _Epoch.count_steps()
        self._key = self._key_of(sources)

    @staticmethod
    def _key_of(sources: Source) -> tuple:
        learned = any(t.is_floating_point() or t.is_complex() for t in sources)
        return (
            _Epoch.devices if learned else 0,
            *map(_versions, sources),
            *((t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in sources),
        )

    def same(self, sources: Source) -> bool:
        return self._key_of(sources) == self._key


class _PlainWatch:
    """A replacement of `extension.Watch` without the extension: a checksum of everything in every call."""

    def __init__(self, sources: Source) -> None:
        self._key = self._key_of(sources)

    @staticmethod
    def _key_of(sources: Source) -> tuple:
        return tuple((t._version, t.data_ptr(), t.shape, t.stride(), t.dtype, _sum(t.detach())) for t in sources)

    def same(self, sources: Source) -> bool:
        return self._key_of(sources) == self._key


def _sum(tensor: Tensor) -> int:
    """A checksum of all bytes that tensor [...] holds."""
    dense = tensor.contiguous()
    return crc32(dense.view(-1).view(torch.uint8).numpy().data) if dense.numel() else 0


def _watch(sources: Source) -> Any:
    if not all(source.is_cpu for source in sources):
        return _DeviceWatch(sources)
    return _PlainWatch(sources) if extension is None else extension.Watch(sources)
