"""Settings, and other plain dataclasses, as JSON: one codec and one way to flatten them."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """The JSON form of a config: nested dicts, lists, strings and numbers."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_dict(kind: type[T], values: Any, where: str = "config") -> T:
    """A config of type `kind` from its JSON form; fields that are left out keep their defaults.

    Raises ValueError that names an unknown key, a value of the wrong type, or a field that is missing.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: value must be an object, got {values!r}")
    upgrade = getattr(kind, "of_earlier_versions", None)  # of a dataclass whose settings were others once
    values = values if upgrade is None else upgrade(values)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ValueError(f"{where}: key must be one of {', '.join(fields)}, got {key!r}")
    hints = typing.get_type_hints(kind)
    given = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        reason = str(error).removeprefix("config: ").removeprefix(f"{where}: ")
        raise ValueError(f"{where}: {reason}") from error


def read_config(kind: type[T], path: Path) -> T:
    """`from_dict` of a JSON file; ValueError, which names the file, when it cannot be read or its values do not fit."""
    try:
        values = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"config: {path} must be a readable JSON file, got {error}") from error
    return from_dict(kind, values, where=str(path))


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, of dotted names.

    >>> flattened({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': [2]}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` of a JSON file as the type `hint` of a config field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _first_fit([a for a in arguments if a is not type(None)], value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], item, where) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is Literal and value in arguments:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    wanted = f"one of {list(arguments)}" if origin is Literal else str(getattr(hint, "__name__", hint))
    raise ValueError(f"{where}: value must be {wanted}, got {value!r}")


def _first_fit(hints: list[Any], value: Any, where: str) -> Any:
    """Convert `value` to the first of the types that takes it; where none does, raise the error of the last one."""
    for hint in hints[:-1]:
        try:
            return _convert(hint, value, where)
        except ValueError:
            continue
    return _convert(hints[-1], value, where)
