"""Ranges of settings, which stand beside the type of each field, and the one place that checks them."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """The finite numbers from `low` to `high`, in an annotation: `rate: Annotated[float, Range(0)]`.

    With `open_low` or `open_high` that bound itself is left out. In a field of tuples it holds for every number.

    >>> str(Range(0)), str(Range(0, 1)), str(Range(0, open_low=True)), str(Range(0, 1, open_high=True))
    ('at least 0', 'in 0..1', 'above 0', 'at least 0 and below 1')
    """

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and not (isinstance(value, float) and math.isinf(value))

    def __str__(self) -> str:
        least = f"above {self.low}" if self.open_low else f"at least {self.low}"
        if math.isinf(self.high):
            return least
        if self.open_low or self.open_high:
            return f"{least} and {'below' if self.open_high else 'at most'} {self.high}"
        return f"in {self.low}..{self.high}"


SEED = Range(0, 2**32 - 1)  # what every generator takes: numpy's has 32 bits


@dataclass(frozen=True)
class Setting:
    """A field of a configuration, or of one inside it."""

    name: str  # with those of the configurations around it: "estimator.first.steps"
    kind: type | None  # int or float for numbers and tuples of numbers; None: something else
    range: Range | None
    value: Any


def settings(config: Any, prefix: str = "") -> Iterator[Setting]:
    """Every field of a configuration and of those inside it."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{prefix}{field.name}.")
            continue
        hint, found = hints[field.name], None
        if typing.get_origin(hint) is Annotated:
            hint, *extras = typing.get_args(hint)
            found = next((extra for extra in extras if isinstance(extra, Range)), None)
        yield Setting(prefix + field.name, _number(hint), found, value)


def check_ranges(config: Any, where: str = "config") -> None:
    """Raise ValueError for the first number of a configuration that lies outside its range, TypeError for none.

    The message begins with `where` and names the setting with the configurations that it is in.
    """
    for setting in settings(config):
        if setting.kind is None or setting.value is None:
            continue
        for value in _flat(setting.value):
            if isinstance(value, bool) or not isinstance(value, (int, float) if setting.kind is float else int):
                raise TypeError(f"{where}: {setting.name} must be {setting.kind.__name__}, got {value!r}")
            if setting.range is not None and value not in setting.range:
                finite = "finite and " if value in (math.inf, -math.inf) else ""
                shown = _shown(setting.value)
                raise ValueError(f"{where}: {setting.name} must be {finite}{setting.range}, got {shown}")


def _number(hint: Any) -> type | None:
    """int or float, if that is what a type, or its tuples or options, are made of."""
    if hint in (int, float):
        return hint
    if typing.get_origin(hint) in (tuple, typing.Union, types.UnionType):
        return next(filter(None, map(_number, typing.get_args(hint))), None)
    return None


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _shown(value: Any) -> str:
    """A number, or tuples of them as lists, as it was given; of a huge one its size."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_shown, value))}]"
    huge = isinstance(value, int) and value.bit_length() > 128
    return f"a number of {value.bit_length()} bits" if huge else str(value)
