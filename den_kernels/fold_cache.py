"""A value derived from tensors, kept until one of them changes."""

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")


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

    def get(self, sources: tuple[Tensor, ...], build: Callable[[], Value]) -> Value:
        """The value of ``sources``, built anew if any of them changed since the last call."""
        if any(source.is_inference() for source in sources):  # such tensors carry no version
            return build()
        key = tuple((source.data_ptr(), source._version, source.dtype, source.device) for source in sources)
        entry = self._entry
        if entry is None or entry[0] != key:
            entry = self._entry = (key, tuple(source.detach() for source in sources), build())
        return entry[2]

    def clear(self) -> None:
        """Forget the value."""
        self._entry = None

    def __deepcopy__(self, memo: dict) -> "FoldCache[Value]":
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()
