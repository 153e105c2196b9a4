"""A base class of weights for which the extension keeps an object of its own."""

from dataclasses import fields
from typing import Any


class HasHandle:
    """Base of a frozen dataclass with a cached property `handle`, an object of the extension made from its fields.

    The object checks the fields when it is made, holds the tensors, and is called with a call's own tensors. Copies and
    pickles take the fields alone; a copy makes its own object.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
