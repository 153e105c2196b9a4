"""A value derived from tensors, kept until one of them changes."""

from collections.abc import Callable
from contextlib import suppress
from operator import attrgetter, methodcaller
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

Value = TypeVar("Value")

# In C, for many tensors.
_is_inference, _address = methodcaller("is_inference"), methodcaller("data_ptr")
_version, _kind = attrgetter("_version"), attrgetter("dtype", "device")


class FoldCache(Generic[Value]):
    """Holds what ``build()`` made of ``sources`` while every source is the same memory in the same version.

    The version counter moves with each in-place change (optimiser steps, ``load_state_dict``, running statistics) and
    the address with each replacement (``.to()``, ``param.data = ...``). The cache keeps the memory it was built from
    alive, so no later tensor can take its address. Writing through ``param.data`` or a NumPy view moves neither:
    owners call :meth:`clear` when they change mode, which covers such writes around ``train()`` and ``eval()``.
    Copies and pickles of a cache are empty.
    """

    def __init__(self) -> None:
        self._entry: tuple[tuple, tuple[Tensor, ...], Value] | None = None
        self._places: tuple[tuple[nn.Module, ...], list[tuple[dict[str, Any], str]]] | None = None

    def get(self, sources: tuple[Tensor, ...], build: Callable[[], Value]) -> Value:
        """The value of ``sources``, built anew if any of them changed since the last call."""
        if any(map(_is_inference, sources)):  # such tensors carry no version
            return build()
        key = *map(_address, sources), *map(_version, sources), *map(_kind, sources)
        entry = self._entry
        if entry is None or entry[0] != key:
            entry = self._entry = (key, tuple(source.detach() for source in sources), build())
        return entry[2]

    def of(self, modules: tuple[nn.Module, ...], build: Callable[[], Value]) -> Value:
        """:meth:`get` of all parameters and buffers of the modules.

        Where they stand is looked up once for a set of modules, and again when one of them is gone (parametrizations
        and pruning move them): asking many modules for their attributes takes longer than to run a small network.
        """
        return self.get(self._tensors(modules), build)

    def _tensors(self, modules: tuple[nn.Module, ...]) -> tuple[Tensor, ...]:
        if self._places is not None and self._places[0] == modules:
            with suppress(KeyError):
                return tuple(t for entries, name in self._places[1] if (t := entries[name]) is not None)
        kept = (entries for each in modules for m in each.modules() for entries in (m._parameters, m._buffers))
        self._places = modules, [(entries, name) for entries in kept for name in entries]
        return tuple(t for entries, name in self._places[1] if (t := entries[name]) is not None)

    def clear(self) -> None:
        """Forget the value."""
        self._entry = None

    def __deepcopy__(self, memo: dict) -> "FoldCache[Value]":
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()
