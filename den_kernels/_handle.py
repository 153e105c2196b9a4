"""Weights that the extension keeps an object for."""

from dataclasses import fields
from typing import Any


class HasHandle:
    """A frozen dataclass with a cached property `handle`, an object of the extension made from its fields.

    The object is checked when it is made, holds the tensors, and is one argument of a call. Copies and pickles are of
    the fields alone and make one of their own.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
