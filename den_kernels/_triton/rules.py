"""The tiles of launches that no table was tuned for: data, one set for each release of Triton and kind of chip.

A tile is here because it compiles well: no register spilled, copies on their way while the tensor cores work
(tests/kernels/test_machine_code.py looks at the machine code of each). Four warps everywhere: convolutions of 8 and
more were miscompiled on Hopper (pytorch issues 173068, 177823, 183989), and no GPU has shown that ours are not. Only
wide tiles of strips (strips.py), which Triton does not pipeline itself, have 8.

A release of Triton that is not here gets the newest rules, and `describe` says so.
"""

from functools import lru_cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """The largest tile of a kernel and how it is run."""

    rows: int  # pixels
    columns: int  # channels written
    depth: int  # channels read in a step
    warps: int
    stages: int
    programs: int  # on a multiprocessor at a time


# The chip whose rules an architecture gets, from this compute capability on. 12.x has the tensor cores of 8.x, and like
# 8.6 and 8.9 no more than 99 KiB of shared memory, within which the tiles of 80 stay.
CHIPS = {80: 80, 90: 90, 100: 100, 120: 80}

# (kind of launch, chip, numbers): tiles by the size up to which each is meant. The size of a convolution is the number
# of channels that it writes, that of a weight gradient (rows: pixels, columns by depth: its sums) is columns * depth.
# numbers: "half", "tf32", and "ieee", float32 without tensor cores, whose operands lie in registers beside the sums.
Rules = dict[tuple[str, int, str], dict[int, Tile]]
ANY = 1 << 30

_3_6: Rules = {
    ("convolve", 80, "half"): {64: Tile(64, 64, 64, 4, 3, 2), ANY: Tile(64, 128, 32, 4, 4, 2)},
    ("convolve", 80, "tf32"): {ANY: Tile(64, 64, 32, 4, 3, 2)},
    ("convolve", 80, "ieee"): {ANY: Tile(32, 64, 16, 4, 3, 2)},
    ("convolve", 90, "half"): {64: Tile(128, 64, 64, 4, 3, 2), ANY: Tile(64, 128, 64, 4, 4, 2)},
    ("convolve", 90, "tf32"): {64: Tile(64, 64, 32, 4, 3, 2), ANY: Tile(64, 128, 32, 4, 4, 2)},
    ("convolve", 90, "ieee"): {ANY: Tile(32, 64, 16, 4, 3, 2)},
    ("convolve", 100, "half"): {64: Tile(128, 64, 32, 4, 4, 2), ANY: Tile(128, 64, 64, 4, 3, 2)},
    ("convolve", 100, "tf32"): {ANY: Tile(64, 64, 32, 4, 3, 2)},
    ("convolve", 100, "ieee"): {ANY: Tile(32, 64, 16, 4, 3, 2)},
    ("weight", 80, "half"): {ANY: Tile(64, 64, 64, 4, 5, 2)},
    ("weight", 80, "tf32"): {ANY: Tile(32, 128, 128, 4, 5, 2)},
    ("weight", 80, "ieee"): {ANY: Tile(32, 64, 64, 4, 5, 2)},
    ("weight", 90, "half"): {ANY: Tile(64, 128, 128, 4, 5, 2)},
    ("weight", 90, "tf32"): {ANY: Tile(32, 128, 128, 4, 5, 2)},
    ("weight", 90, "ieee"): {ANY: Tile(32, 64, 64, 4, 5, 2)},
    ("weight", 100, "half"): {ANY: Tile(64, 128, 128, 4, 5, 2)},
    ("weight", 100, "tf32"): {ANY: Tile(32, 128, 128, 4, 5, 2)},
    ("weight", 100, "ieee"): {ANY: Tile(32, 64, 64, 4, 5, 2)},
}
_3_7 = _3_6 | {
    ("weight", 100, "half"): {ANY: Tile(128, 64, 64, 4, 5, 2)},
    ("weight", 100, "tf32"): {ANY: Tile(64, 64, 64, 4, 5, 2)},
}
_3_8 = _3_6 | {
    ("weight", 80, "half"): {ANY: Tile(128, 64, 64, 4, 5, 2)},
    ("convolve", 100, "tf32"): {64: Tile(64, 64, 32, 4, 4, 2), ANY: Tile(128, 64, 32, 4, 3, 2)},
    ("weight", 100, "half"): {ANY: Tile(128, 64, 64, 4, 4, 2)},
}
RULES: dict[tuple[int, int], Rules] = {(3, 6): _3_6, (3, 7): _3_7, (3, 8): _3_8}


def numbers_of(dtype: torch.dtype, ieee: bool) -> str:
    """The name, in the keys of `Rules`, of how a dtype is multiplied."""
    if dtype != torch.float32:
        return "half"
    return "ieee" if ieee else "tf32"


def release_of(version: str) -> tuple[int, int]:
    """The release whose rules a version of Triton gets.

    >>> release_of("3.7.1"), release_of("3.99.0") == release_of("") == max(RULES)
    ((3, 7), True)
    """
    parts = version.split(".")[:2]
    release = (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(map(str.isdecimal, parts)) else (0, 0)
    return release if release in RULES else max(RULES)


@lru_cache(maxsize=1)
def installed() -> str:
    """The version of Triton, "" where there is none."""
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def find(kind: str, arch: int, numbers: str, size: int, version: str | None = None) -> Tile:
    """The tile of a kind of launch; `arch` is 80 for compute capability 8.0, `version` the installed Triton's."""
    chip = CHIPS[max((least for least in CHIPS if least <= arch), default=80)]
    tiles = RULES[release_of(installed() if version is None else version)][kind, chip, numbers]
    return tiles[min(most for most in tiles if size <= most)]


def describe(version: str | None = None) -> str:
    """A line for a report: the rules that launches follow, and a note where they were not made for this Triton."""
    version = installed() if version is None else version
    release = ".".join(map(str, release_of(version)))
    if version.split(".")[:2] == release.split("."):
        return f"launch rules of Triton {release}"
    return f"launch rules of Triton {release}, the newest known: there are none for {version or 'an absent Triton'}"
