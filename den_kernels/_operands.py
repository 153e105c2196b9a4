"""The operands of a block's op behind x, by name: the tensors of a route, and fields of the block's weights."""

from typing import Any, get_type_hints

from torch import Tensor

from .plan import Route

_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", list[Tensor]: "Tensor[]",
    int: "SymInt", list[int]: "SymInt[]", bool: "bool", str: "str",
}  # fmt: skip
_ROUTE = ("levels", "order", "offsets", "mask")


class Operands:
    """The fields of a named tuple as operands of an op: its schema, and the way from weights to operands and back.

    names: the named tuple; its fields are those of a route (levels, order, offsets, mask), then fields of `weights`,
    the class of the weights, with `groups` and `direct` among them.
    """

    def __init__(self, names: Any, weights: Any) -> None:
        hints = get_type_hints(names)
        self._names, self._weights = names, weights
        self._fields = tuple((name, hint in (list[int], list[Tensor])) for name, hint in hints.items())
        self.text = ", ".join(f"{_TYPES[hint]} {name}" for name, hint in hints.items())
        """Of a schema: the types and the names."""

    def of(self, route: Route, weights: Any) -> tuple:
        """The operands that stand for a route and weights."""
        held = ((getattr(route if name in _ROUTE else weights, name), listed) for name, listed in self._fields)
        return tuple(list(value or ()) if listed else value for value, listed in held)

    def route(self, operands: tuple) -> Route:
        """The route that the operands stand for."""
        given = self._names(*operands)
        return Route(given.levels, given.order, given.offsets, len(given.groups), given.mask)

    def weights(self, operands: tuple) -> Any:
        """The weights that the operands stand for; their `direct` is None where it has no tensor."""
        given = {
            name: tuple(value) if listed else value
            for (name, listed), value in zip(self._fields, operands, strict=True)
            if name not in _ROUTE
        }
        return self._weights(**given | {"direct": given["direct"] or None})

    def __len__(self) -> int:
        return len(self._fields)
