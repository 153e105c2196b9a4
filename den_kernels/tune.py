"""Tune the Triton launches for the GPU of this machine, offline.

    python -m den_kernels.tune [--seconds 300] [--kinds convolve weight] [--channels 64 128 256 512]
                               [--dtypes bfloat16 float32] [--out FOLDER]

Every kind of launch (a convolution, a weight gradient) is tried at each width and dtype, at the map sizes of a residual
network with 256 images, all at the full level and mixed evenly. The search goes from the tile that the rules choose,
one field after another (rows, columns, depth, warps, stages, programs), as long as that gains. A tile counts only after
its result was compared with float64 element by element; one that wins must then give the same bits three times and pass
another, ragged case, and one of 8 or more warps (miscompiled before on Hopper: pytorch issues 173068, 177823,
183989) must also be 3 % faster than the best of fewer.

What gains 2 % or more over the rules goes into FOLDER/sm_<architecture>.json after every case; without --out that
is the table of this installation (`_triton/table.py` says what it holds). Its keys are kind, widths and dtype, never
counts of instances, and nothing is tuned while a model runs.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from ._triton import choice, rules, table
from ._triton.boxes import tile_by_rule
from ._triton.choice import Side
from ._triton.clock import median_seconds
from ._triton.launch import architecture
from ._triton.rules import Tile
from ._triton.trial import Case, Trial, cases, ragged, trials

VALUES = {
    "rows": (32, 64, 128, 256), "columns": (32, 64, 128, 256), "depth": (16, 32, 64, 128),
    "warps": (4, 8), "stages": (2, 3, 4, 5), "programs": (1, 2, 3, 4),
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WORTH = 1.02  # times faster than the rule
DISTRUST = 1.03  # times faster than fewer warps


@contextmanager
def trying(arch: int, key: table.Key, tile: Sequence[int] | None) -> Iterator[None]:
    """Put a tile into the table in memory, so that the launchers themselves take it; None: that of the rules."""
    entries = table.tiles(arch)
    before = entries.pop(key, None)
    if tile is not None:
        entries[key] = tuple(tile)
    try:
        yield
    finally:
        entries.pop(key, None)
        if before is not None:
            entries[key] = before


def rule(case: Case, arch: int) -> Tile:
    """The tile without a table."""
    with trying(arch, case.key, None):
        if case.kind == "weight":
            sides = Side(case.channels, case.groups), Side(case.channels, ())
            return choice.choose_weight_tile(*sides, case.dtype, arch, False)
        C = case.channels
        boxes_tile = tile_by_rule(C, C, (case.size,) * 2) if arch >= 90 and case.dtype.itemsize == 2 else None
        return boxes_tile or choice.choose_tile(C, C, case.dtype, arch)


def shared_bytes(kind: str, tile: Tile, dtype: torch.dtype) -> int:
    """Shared memory of the stages of both operands.

    >>> shared_bytes("convolve", Tile(128, 64, 64, 4, 3, 2), torch.bfloat16)
    73728
    """
    rows, columns, depth = tile[:3]
    step = rows * (columns + depth) if kind == "weight" else depth * (rows + columns)
    return tile.stages * step * dtype.itemsize


def fits(kind: str, tile: Tile, n: int, k: int, dtype: torch.dtype, shared: int) -> bool:
    """True where a tile is sound, its operands fit shared memory and its sums 128 registers a thread."""
    sums = tile.columns * (tile.depth if kind == "weight" else tile.rows)
    in_registers = 8 <= sums // (32 * tile.warps) <= 128
    return table.is_sound(tile, n, k) and in_registers and shared_bytes(kind, tile, dtype) <= shared


def neighbours(case: Case, tile: Tile, field: str, shared: int) -> list[Tile]:
    """The tiles that differ in one field and fit."""
    _, n, k, _ = case.key
    found = [tile._replace(**{field: value}) for value in VALUES[field] if value != getattr(tile, field)]
    return [other for other in found if fits(case.kind, other, n, k, case.dtype, shared)]


def shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 163 << 10
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 << 10))


def compile_ahead(candidates: Sequence[Tile], tested: Sequence[Trial], arch: int) -> None:
    """Compile the kernels of some candidates side by side; one that cannot be compiled fails when it is tried."""
    if tested[0].x.device.type != "cuda":
        return
    from triton import AsyncCompileMode

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for tile, trial in product(candidates, tested):
            with trying(arch, trial.case.key, tile):
                launch = trial.launch()
                launch.kernel.warmup(grid=(launch.programs,), **launch.arguments)


def score(tile: Tile, tested: Sequence[Trial], arch: int) -> float:
    """Seconds of all trials with the tile; infinite where a result is wrong or the launch impossible.

    That of the rules is tried without a table, where the launch may be one on strips, which no table asks for.
    """
    case, device = tested[0].case, tested[0].x.device
    with trying(arch, case.key, None if tile == rule(case, arch) else tile):
        try:
            if any(trial.error() > 1 for trial in tested):
                return float("inf")
            return sum(median_seconds(trial.call, device) for trial in tested)
        except Exception as error:
            if device.type == "cuda" and "CUDA error" in str(error):  # nothing runs in this process any more
                raise
            return float("inf")


def is_trusted(tile: Tile, tested: Sequence[Trial], arch: int) -> bool:
    """True where three runs give equal bits and a ragged case comes out right."""
    odd = ragged(tested[0].case, tested[0].x.device)
    with trying(arch, odd.case.key, tile):
        once = [trial.bits() for trial in tested]
        again = [torch.equal(trial.bits(), first) for _ in range(2) for trial, first in zip(tested, once, strict=True)]
        return all(again) and odd.error() <= 1


def choose(scores: dict[Tile, float], first: Tile, trusted: Callable[[Tile], bool]) -> Tile:
    """The fastest trusted tile, `first` unless another is worth it; 8 or more warps must win clearly."""
    fewer = min((seconds for tile, seconds in scores.items() if tile.warps < 8), default=float("inf"))
    for tile in sorted(scores, key=lambda tile: scores[tile]):
        gains = scores[tile] * WORTH <= scores[first]
        if not gains or tile == first:
            break
        if (tile.warps < 8 or scores[tile] * DISTRUST <= fewer) and trusted(tile):
            return tile
    return first


class Found(NamedTuple):
    """The result of the search of one case."""

    case: Case
    rule: Tile
    tile: Tile
    rule_seconds: float
    seconds: float
    tried: int


def search(case: Case, device: torch.device, deadline: float, clock: Callable[[], float] = time.monotonic) -> Found:
    """Try tiles from the rule's on, field by field, until a round gains nothing or the deadline is past."""
    arch, shared = architecture(device)[0], shared_memory(device)
    tested = trials(case, device)
    first = best = rule(case, arch)
    scores = {first: score(first, tested, arch)}
    improved = True
    while improved and clock() < deadline:
        improved = False
        for field in VALUES:
            found = [tile for tile in neighbours(case, best, field, shared) if tile not in scores]
            if found and clock() < deadline:
                compile_ahead(found, tested, arch)
            for tile in found:
                if clock() < deadline:
                    scores[tile] = score(tile, tested, arch)
            fastest = min(scores, key=lambda tile: scores[tile])
            improved |= fastest != best
            best = fastest
    chosen = choose(scores, first, lambda tile: is_trusted(tile, tested, arch))
    return Found(case, first, chosen, scores[first], scores[chosen], len(scores))


def describe(found: Found) -> str:
    """The result of a search as a line of text: tile, times, gain over the rule, tiles tried."""
    kind, n, _, dtype = found.case.key
    gain = found.rule_seconds / found.seconds if found.seconds else 1.0
    return (
        f"{kind} {n} {dtype}: {tuple(found.tile)} {found.seconds * 1e6:.1f} us, rule {tuple(found.rule)} "
        f"{found.rule_seconds * 1e6:.1f} us, {gain:.2f}x, {found.tried} tried"
    )


def tune(
    todo: Sequence[Case],
    device: torch.device,
    seconds: float,
    folder: Path | None = None,
    report: Callable[[str], object] = print,
) -> list[Found]:
    """Search every case within `seconds`, sharing what is left of them, and write the table after each."""
    arch, end, results = architecture(device)[0], time.monotonic() + seconds, []
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for done, case in enumerate(todo):
        now = time.monotonic()
        if now >= end:
            report(f"out of time: {len(todo) - done} of {len(todo)} cases were not searched")
            break
        found = search(case, device, now + (end - now) / (len(todo) - done))
        results.append(found)
        report(describe(found))
        entries = table.tiles(arch)
        entries.pop(case.key, None)
        if found.tile != found.rule:
            entries[case.key] = tuple(found.tile)
        write(table.render(entries, arch, gpu, rules.installed()), table.file_of(arch, folder))
    return results


def write(text: str, path: Path) -> None:
    """Write the file whole or not at all: to a temporary file beside it, which then takes its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m den_kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="for all cases together (default 300)")
    parser.add_argument("--kinds", nargs="+", default=list(table.KINDS), choices=table.KINDS)
    parser.add_argument("--channels", nargs="+", type=int, default=[64, 128, 256, 512], choices=table.WIDTHS)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=list(DTYPES))
    parser.add_argument("--out", type=Path, help="folder of the table (default: that of this installation)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("den_kernels.tune: a CUDA device is needed, torch finds none", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    todo = cases(options.kinds, options.channels, [DTYPES[name] for name in options.dtypes])
    tune(todo, device, options.seconds, options.out, lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
