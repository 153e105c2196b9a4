"""Tuned tiles: tables that `python -m den_kernels.tune` wrote on a GPU and that are installed with the package.

One file an architecture, tables/sm_<arch>.json:

    {"format": 2, "arch": 90, "gpu": "NVIDIA H200", "triton": "3.6.0", "tiles": [
    {"dtype": "bfloat16", "k": 64, "kind": "convolve", "n": 64, "tile": [128, 64, 64, 4, 3, 2]}, ...]}

kind: "convolve", "weight" (the gradient of a weight under levels).
n, k: channels written and read, rounded up to a power of two from 16 to 512. Never a count of instances or tiles.
tile: the fields of `rules.Tile`.

A table of another format, or that another version of Triton was tuned with, is ignored with one warning: launches then
follow the rules (rules.py), as they do where there is no table or no entry.
"""

import json
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from . import rules

FORMAT = 2
FOLDER = Path(__file__).parent / "tables"
KINDS = ("convolve", "weight")
WIDTHS = tuple(2**i for i in range(4, 10))

Key = tuple[str, int, int, str]
Fields = tuple[int, ...]


def key(kind: str, n: int, k: int, dtype: torch.dtype) -> Key:
    """The key of a launch in the table.

    >>> key("weight", 64, 16, torch.bfloat16)
    ('weight', 64, 16, 'bfloat16')
    """
    return kind, n, k, str(dtype).removeprefix("torch.")


def file_of(arch: int, folder: Path | None = None) -> Path:
    """The file of an architecture's table, in `folder` or in the package."""
    return (folder or FOLDER) / f"sm_{arch}.json"


@lru_cache(maxsize=16)
def tiles(arch: int) -> dict[Key, Fields]:
    """The tuned tiles of an architecture (90 for compute capability 9.0): read once, empty where there are none."""
    path = file_of(arch)
    if not path.exists():
        return {}
    try:
        return parse(path.read_text(encoding="utf-8"), arch, rules.installed())
    except (OSError, ValueError) as error:
        warnings.warn(f"den_kernels: {path.name} is ignored, launches follow the rules: {error}", stacklevel=2)
        return {}


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


def parse(text: str, arch: int, triton: str) -> dict[Key, Fields]:
    """The tiles of a table. Raises ValueError unless it is of this format, architecture and Triton, and sound."""
    document = json.loads(text)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"table: format must be {FORMAT}, got {_get(document, 'format')}")
    if document.get("arch") != arch:
        raise ValueError(f"table: arch must be {arch}, got {document.get('arch')}")
    if _release(str(document.get("triton"))) != _release(triton):
        raise ValueError(f"table: triton must be {'.'.join(_release(triton))}, got {document.get('triton')}")
    entries = document.get("tiles")
    if not isinstance(entries, list):
        raise ValueError(f"table: tiles must be a list, got {type(entries).__name__}")
    return dict(_entry(entry) for entry in entries)


def _get(document: Any, name: str) -> Any:
    return document.get(name) if isinstance(document, dict) else type(document).__name__


def _entry(entry: Any) -> tuple[Key, Fields]:
    kind, n, k, dtype, tile = (_get(entry, name) for name in ("kind", "n", "k", "dtype", "tile"))
    known = kind in KINDS and n in WIDTHS and k in WIDTHS and dtype in ("float32", "float16", "bfloat16")
    if not known or not isinstance(tile, list) or not is_sound(tile, n, k):
        raise ValueError(f"table: an entry must be a known kind, widths, dtype and a tile that fits them, got {entry}")
    return (kind, n, k, dtype), tuple(tile)


def is_sound(tile: list[int] | Fields, n: int, k: int) -> bool:
    """True where a launch of n by k channels may have this tile: powers of two within what the kernels take."""
    if len(tile) != 6 or not all(type(value) is int and value > 0 for value in tile):
        return False
    rows, columns, depth, warps, stages, programs = tile
    power = all(value & (value - 1) == 0 for value in (rows, columns, depth, warps))
    fits = 16 <= rows <= 256 and 16 <= columns <= min(n, 256) and 16 <= depth <= min(k, 128)
    return power and fits and 1 <= warps <= 16 and 1 <= stages <= 8 and 1 <= programs <= 8


def render(found: dict[Key, Fields], arch: int, gpu: str, triton: str) -> str:
    """The text of a table, one entry a line in a fixed order."""
    names = ("kind", "n", "k", "dtype")
    lines = [
        json.dumps(dict(zip(names, where, strict=True)) | {"tile": list(tile)}, sort_keys=True)
        for where, tile in sorted(found.items())
    ]
    head = json.dumps({"format": FORMAT, "arch": arch, "gpu": gpu, "triton": triton})
    return head[:-1] + ', "tiles": [\n' + ",\n".join(lines) + "\n]}\n"
