"""Backbones of other people: of a Python file, or of a package that offers them as entry points.

    --network.backbone mine.py:tiny     a `Backbone`, or a function that returns one, by the name `tiny` in mine.py
    --network.backbone tiny             one that an installed package has under the entry points `den.backbones`

The file is run when the network is made, and again when a run of it is opened, so it must stay where it is.
"""

import importlib.util
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

GROUP = "den.backbones"
FILE = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)", re.DOTALL)


def own_backbone(name: str) -> Any:
    """The object that a file or an entry point gives as the backbone of a name; None where it names neither.

    Raises:
        ValueError: a file that is missing or cannot be run, or has no such name.
    """
    if found := FILE.fullmatch(name):
        return _called(_of_file(Path(found["file"]).expanduser(), found["name"]), name)
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            try:
                loaded = entry.load()
            except Exception as error:  # whatever the package raises
                raise ValueError(f"backbone: {name} must be loaded from {entry.value}, got {error}") from error
            return _called(loaded, name)
    return None


def resolved(name: str) -> str:
    """The name with the whole path of its file, so that a run is found again from another folder."""
    found = FILE.fullmatch(name)
    return f"{Path(found['file']).expanduser().resolve()}:{found['name']}" if found else name


def _of_file(path: Path, name: str) -> Any:
    if not path.is_file():
        raise ValueError(f"backbone: {path} must be a Python file, got none there")
    spec = importlib.util.spec_from_file_location(f"den_backbone_{path.stem}", path)
    assert spec is not None, "a .py file"
    assert spec.loader is not None, "a .py file"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file raises
        raise ValueError(f"backbone: {path} must run, got {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"backbone: {path} must define {name}, got none of that name")
    return getattr(module, name)


def _called(found: Any, name: str) -> Any:
    """The backbone itself, or the one that the function `found` makes."""
    try:
        return found() if callable(found) else found
    except Exception as error:  # whatever the function raises
        raise ValueError(f"backbone: {name} must return a Backbone, got {type(error).__name__}: {error}") from error
