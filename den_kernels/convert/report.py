"""What `convert` did to a model."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """One elastic block of a converted model."""

    name: str
    """The path of the module that holds the block."""
    kind: str
    """Of the branch, and where its shortcut joins: "post-activation basic block"."""
    kernel: str
    """What runs it."""
    groups: tuple[tuple[int, ...], ...]
    """The sizes of the channel groups of each hidden map, in the order of the branch."""
    lowest: int
    """0; 1 of a block without a shortcut, which cannot be left out."""
    layers: tuple[str, ...]
    """The paths of the modules that know the levels."""


@dataclass(frozen=True)
class LeftAlone:
    """A sum or a block that stays as it was."""

    name: str
    """The path of the module that adds; "" of the model itself."""
    reason: str


@dataclass(frozen=True)
class Report:
    """The blocks of a converted model, a column of the levels each, and what was left alone."""

    blocks: tuple[Block, ...]
    left: tuple[LeftAlone, ...]
    groups: int
    """G: levels of a block are 0..G."""
    shares: tuple[float, ...] = ()
    """Of the channel groups in the hidden channels, in proportion."""

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    @property
    def lowest(self) -> tuple[int, ...]:
        """The lowest level of each block."""
        return tuple(block.lowest for block in self.blocks)

    def __str__(self) -> str:
        rows = [(str(n), b.name, b.kind, _shown(b.groups), b.kernel) for n, b in enumerate(self.blocks)]
        lines = _table([("", "block", "kind", "channel groups", "run by"), *rows])
        lines += [f"left alone: {each.name or 'model'}: {each.reason}" for each in self.left]
        return "\n".join(lines)


def _shown(groups: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join("+".join(map(str, sizes)) for sizes in groups)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
