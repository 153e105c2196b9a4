"""Predicted times on GPUs, none of them measured: ``python -m benchmarks.gpu_predict --chip H200``.

For every residual block of WRN-32-4 and ResNet-42, 256 images in bfloat16: floors (FLOPs over the matrix rate, bytes
over the bandwidth); the dense block at a share of the matrix rate (cuDNN is seen at 45 to 65 % on a Hopper GPU); two
launches and the fused kernel by the cycle model of `benchmarks/gpu_model.py`; and the realised fraction of the way that
the library takes, which is not always the faster one.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from den.nn.backbones import BACKBONES
from den.nn.block_lists import block_shapes
from den.nn.blocks import ResidualShape
from den.support.tables import markdown_table
from den_kernels._cuda_layout import FusedArguments, fused_layout
from den_kernels._triton import strips

from .gpu_model import CHIPS, CODE, Chip, Fused, fused, problem_of, two_launches

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "gpu.md", ROOT / "benchmarks" / "GPU_SESSION.md"
MIXES = {"full": (0, 0, 0, 1), "uniform": (0.25, 0.25, 0.25, 0.25), "quarter": (0, 1, 0, 0)}  # of levels 0, 1, 2, 3


def map_bytes(p: FusedArguments, counts: Sequence[int]) -> int:
    """Bytes of maps that a block must move which adds to a map, with counts[l] instances at level l.

    These are x for the activations, what the branch is added to, and the result.
    """
    rows, active = -(-p.H // p.stride), sum(counts[1:])
    map_in, map_out = p.itemsize * p.C * p.H * p.W, p.itemsize * p.C_out * rows * -(-p.W // p.stride)
    return active * (map_in + 2 * map_out)


class Prediction(NamedTuple):
    """Predicted times in seconds, and the FLOPs ratio."""

    matrix: float  # floor: FLOPs
    maps: float  # floor: bytes, the hidden map on the chip
    dense: float
    two: float
    fused: float  # infinite where the fused kernel has no layout for the block
    ours: float  # of the way that the library takes
    flops_ratio: float

    @property
    def realised(self) -> float:
        """Realised fraction: the saving in time over the saving in FLOPs."""
        return self.dense / self.ours / self.flops_ratio


def predict(block: ResidualShape, mix: str, chip: Chip, B: int = 256, code: Fused = CODE) -> Prediction:
    """The times of a block of 1 + 3 levels, for B images in a mix of them."""
    p, counts = problem_of(block, B, chip), [round(B * share) for share in MIXES[mix]]
    rate = chip.flops * chip.multiprocessors * chip.clock
    work = [B * block.flops(p.widths[-1]), sum(n * block.flops(w) for n, w in zip(counts[1:], p.widths, strict=True))]
    rows = p.H // p.stride
    dense_maps = (map_bytes(p, (0, 0, 0, B)) + 2 * p.itemsize * B * rows * rows * p.widths[-1]) / chip.bandwidth
    layout = fused_layout(p)
    maps = map_bytes(p, counts) / chip.bandwidth
    two = two_launches(p, counts, chip)
    one = float("inf") if layout is None else fused(p, layout, counts, chip, code)
    groups = tuple(b - a for a, b in zip((0, *p.widths), p.widths, strict=False))
    on_strips = strips.take_block(groups, p.C_out, (rows, rows), p.stride, torch.bfloat16, chip.arch)
    ours = one if layout is not None and layout.is_worth(p) and not on_strips else two
    return Prediction(
        work[1] / rate, maps, max(work[0] / rate / chip.dense, dense_maps), two, one, ours, work[0] / work[1]
    )


def sums(network: str, mix: str, chip: Chip) -> Prediction:
    """The blocks of a network together."""
    backbone = BACKBONES[network]
    made = [predict(block, mix, chip) for block in block_shapes(backbone.stages, backbone.stem, 32)]
    ratio = sum(one.matrix * one.flops_ratio for one in made) / sum(one.matrix for one in made)
    return Prediction(*(sum(one[i] for one in made) for i in range(6)), ratio)  # type: ignore[arg-type]


def cells(one: Prediction) -> list[str]:
    """The numbers of a line: microseconds, and the realised fraction."""
    times = ["-" if seconds == float("inf") else f"{seconds * 1e6:.0f}" for seconds in one[:6]]
    return [*times, f"{one.realised:.2f}"]


def table(network: str, chip: Chip) -> str:
    """A line for each kind of block and mix, and the sums of the network."""
    backbone, lines = BACKBONES[network], []
    blocks = block_shapes(backbone.stages, backbone.stem, 32)
    for mix in MIXES:
        for block in dict.fromkeys(blocks):
            name = f"{block.in_channels}-{block.channels}x{block.size}x{block.size}/{block.stride}"
            lines.append([name, mix, *cells(predict(block, mix, chip))])
        lines.append([f"all {len(blocks)}", mix, *cells(sums(network, mix, chip))])
    head = ["block", "mix", "matrix", "bytes", "dense", "two", "fused", "ours", "realised"]
    return markdown_table(head, lines)


def filled(page: Path) -> str:
    """The text of a page with today's predictions between its marks `<!-- predicted CHIP, NETWORK -->`."""

    def fill(found: re.Match) -> str:
        return f"{found[1]}\n{table(found[3], CHIPS[found[2]])}\n{found[4]}"

    marks = r"(<!-- predicted ([\w ]+), (\w+) -->)\n(?:.*?\n)??(<!-- end -->)"
    return re.sub(marks, fill, page.read_text(encoding="utf-8"), flags=re.DOTALL)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_predict", description=__doc__)
    parser.add_argument("--chip", default="H200", choices=list(CHIPS))
    parser.add_argument("--tflops", type=float, help="measured matrix rate in bfloat16, in place of the chip's")
    parser.add_argument("--tbps", type=float, help="measured copy bandwidth, read plus written")
    parser.add_argument("--l2-tbps", type=float, help="bandwidth of L2")
    parser.add_argument("--dense", type=float, help="share of the matrix rate that cuDNN reaches")
    parser.add_argument("--write", action="store_true", help="write the pages that show predictions, nothing else")
    options = parser.parse_args()
    if options.write:
        for page in PAGES:
            page.write_text(filled(page), encoding="utf-8")
        return
    chip = CHIPS[options.chip]
    if options.tflops:
        chip = chip._replace(flops=options.tflops * 1e12 / chip.multiprocessors / chip.clock)
    if options.tbps:
        chip = chip._replace(bandwidth=options.tbps * 1e12)
    if options.l2_tbps:
        chip = chip._replace(l2=options.l2_tbps * 1e12)
    if options.dense:
        chip = chip._replace(dense=options.dense)
    for network in ("wrn32_4", "resnet42"):
        print(f"{network} on {chip.name}, predicted, B = 256, bfloat16, microseconds")
        print(table(network, chip), end="\n\n")


if __name__ == "__main__":
    main()
