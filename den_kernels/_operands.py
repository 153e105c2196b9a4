"""The operands of a block's op behind x, by name: the tensors of a route, and fields of the block's weights."""

import dataclasses
from typing import Any, get_type_hints

from torch import Tensor

from .plan import Route

ROUTE = "Tensor levels, Tensor order, Tensor offsets, Tensor? mask"
_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", bool: "bool", str: "str",
    tuple[int, ...]: "SymInt[]", tuple[Tensor, ...] | None: "Tensor[]",
}  # fmt: skip


class Operands:
    """A route, and the fields of a class of weights, as operands of an op: its schema, and the way there and back.

    weights: a dataclass with `groups` and `direct` among its fields; those of a type that no operand has are left out.
    Exported programs hold the operands in the order of its fields.
    """

    def __init__(self, weights: Any) -> None:
        hints = get_type_hints(weights)
        kinds = {each.name: _TYPES.get(hints[each.name]) for each in dataclasses.fields(weights)}
        self._weights, self._kinds = weights, {name: kind for name, kind in kinds.items() if kind}
        self.text = ", ".join([ROUTE, *(f"{kind} {name}" for name, kind in self._kinds.items())])
        """Of a schema: the types and the names."""

    def of(self, route: Route, weights: Any) -> tuple:
        """The operands that stand for a route and weights."""
        held = ((getattr(weights, name), kind.endswith("[]")) for name, kind in self._kinds.items())
        fields = (list(value or ()) if listed else value for value, listed in held)
        return route.levels, route.order, route.offsets, route.mask, *fields

    def route(self, operands: tuple) -> Route:
        """The route that the operands stand for."""
        (levels, order, offsets, mask), fields = operands[:4], dict(zip(self._kinds, operands[4:], strict=True))
        return Route(levels, order, offsets, len(fields["groups"]), mask)

    def weights(self, operands: tuple) -> Any:
        """The weights that the operands stand for; their `direct` is None where it has no tensor."""
        given = {
            name: tuple(value) if kind.endswith("[]") else value
            for (name, kind), value in zip(self._kinds.items(), operands[4:], strict=True)
        }
        return self._weights(**given | {"direct": given["direct"] or None})

    def __len__(self) -> int:
        return 4 + len(self._kinds)
