"""Milliseconds of each block of a converted model at each level."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

import torch
from torch import Tensor, nn

from .carrier import Shared, carrier_of, levels
from .record import evaluating
from .report import Block

_OP = "latency_table"


@dataclass(frozen=True)
class LatencyTable:
    """What the blocks of a model cost on one machine, for batches of one size."""

    blocks: tuple[str, ...]
    """The names of the N blocks."""
    milliseconds: tuple[tuple[float, ...], ...]
    """[N][G + 1]: of a block with a whole batch at a level. Below the lowest level of a block its own."""
    rest: float
    """Milliseconds of what lies outside of the blocks."""
    batch: int
    device: str
    threads: int
    dtype: str
    torch: str
    """The version."""

    def estimate(self, levels: Tensor | Sequence[int]) -> Tensor:
        """Milliseconds of a batch at levels [N] -> [], or of each of many structures [S, N] -> [S]; float64."""
        levels, N = torch.as_tensor(levels), len(self.blocks)
        table = torch.tensor(self.milliseconds, dtype=torch.float64)
        if levels.ndim not in (1, 2) or levels.shape[-1] != N:
            raise ValueError(f"{_OP}: levels must be [{N}] or [S, {N}], got {list(levels.shape)}")
        low, high = (int(levels.min()), int(levels.max())) if levels.numel() else (0, 0)
        if low < 0 or high >= table.shape[1]:
            raise ValueError(f"{_OP}: levels must be in 0..{table.shape[1] - 1}, got {low}..{high}")
        return self.rest + table[torch.arange(len(self.blocks)), levels.long()].sum(-1)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The table that `save` wrote. Raises ValueError for a file that holds something else."""
        try:
            read = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = tuple(tuple(map(float, row)) for row in read.pop("milliseconds"))
            table = cls(tuple(read.pop("blocks")), rows, **read)
        except (TypeError, KeyError, AttributeError, ValueError) as why:
            raise ValueError(f"{_OP}: file must be one that LatencyTable.save wrote, got {path}: {why}") from None
        if len(table.blocks) != len(rows) or len({len(row) for row in rows}) != 1:
            raise ValueError(f"{_OP}: milliseconds must have a row of equal length for each block, got {path}")
        return table


def latency_table(
    model: nn.Module, example: Tensor, *, repeats: int = 20, path: str | Path | None = None, progress: bool = True
) -> LatencyTable:
    """Measure each block of a converted model at each level: medians of interleaved runs, in evaluation mode.

    example: a batch [B, C, H, W], on the device that the table is for. A block is run by itself, on what it reads in a
    run of the model. One that is no module of its own (the model's forward runs its layers) is measured by whole runs,
    as what they take more than at its lowest level. path: where to write the table, too.

    Raises ValueError for a model that was not converted and for less than one repeat.
    """
    shared = carrier_of(model, _OP).shared
    if repeats < 1:
        raise ValueError(f"{_OP}: repeats must be at least 1, got {repeats}")
    from tqdm import tqdm

    G, N = shared.groups, len(shared.blocks)
    times: dict[tuple[int, int], list[float]] = {}
    with evaluating(model):
        calls = _block_calls(model, shared, example)
        for _ in tqdm(range(repeats + 1), "rounds", disable=not progress, leave=False):
            for n, block in enumerate(shared.blocks):
                for level in range(block.lowest, G + 1):
                    own = torch.full((len(example), N), G, device=example.device)
                    own[:, n] = level
                    call = calls[n] or (lambda: model(example))
                    times.setdefault((n, level), []).append(_milliseconds(model, call, own))
            top = torch.full((len(example), N), G, device=example.device)
            times.setdefault((N, G), []).append(_milliseconds(model, lambda: model(example), top))
    found = {key: median(values[1:]) for key, values in times.items()}  # the first round warms up
    rows = []
    for n, block in enumerate(shared.blocks):
        row = [found[n, max(level, block.lowest)] for level in range(G + 1)]
        rows.append(tuple(row if calls[n] else [max(0.0, t - row[0]) for t in row]))
    table = LatencyTable(
        tuple(block.name for block in shared.blocks), tuple(rows), max(0.0, found[N, G] - sum(row[-1] for row in rows)),
        len(example), str(example.device), torch.get_num_threads(), str(example.dtype).removeprefix("torch."),
        torch.__version__,
    )  # fmt: skip
    if path is not None:
        table.save(path)
    return table


def _block_calls(model: nn.Module, shared: Shared, example: Tensor) -> list[Callable[[], Any] | None]:
    """For each block a call of its module on what it reads; None where no module holds all its layers."""
    read: dict[str, tuple[tuple, dict[str, Any]]] = {}
    paths = dict(model.named_modules())
    names = [next((p for p in paths if p.endswith(b.name) and _holds(paths, p, b)), None) for b in shared.blocks]
    hooks = []
    for name in {name for name in names if name is not None}:

        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], name: str = name) -> None:
            read[name] = args, kwargs

        hooks.append(paths[name].register_forward_pre_hook(keep, with_kwargs=True))
    try:
        model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return [None if name is None else _Call(paths[name], *read[name]) for name in names]


def _holds(paths: dict[str, nn.Module], path: str, block: Block) -> bool:
    """True where the module at a path is the block, whose layers stand below it. The model may be wrapped."""
    prefix = path.removesuffix(block.name)
    return path != "" and all(
        f"{prefix}{layer}".startswith(f"{path}.") and f"{prefix}{layer}" in paths for layer in block.layers
    )


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        return self.module(*self.args, **self.kwargs)


def _milliseconds(model: nn.Module, call: Callable[[], Any], own: Tensor) -> float:
    with levels(model, own):
        _synchronise(own.device)
        start = time.perf_counter()
        call()
        _synchronise(own.device)
        return 1e3 * (time.perf_counter() - start)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
