"""Predicted times on a GPU that is not measured yet: ``python -m benchmarks.gpu_predict --tflops 790 --tbps 4.3``.

For every residual block of WRN-32-4 and ResNet-42: floors (FLOPs over the matrix rate, bytes over the bandwidth), and
times predicted with the shares of the rate in `SHARES`, of the dense block, of two Triton launches behind a pass that
writes relu(bn1(x)), and of the fused kernel, which can also be bound by the weights that it streams from L2.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from den.nn.backbones import BACKBONES, block_shapes
from den.nn.blocks import ResidualShape
from den_kernels._cuda_layout import FusedArguments, fused_layout

from .tables import table as markdown

SHARES = {"dense": 0.45, "composition": 0.38, "fused": 0.40}  # of the matrix rate: cuDNN seen publicly, ours guessed
L2_BYTES = 5.5e12  # bytes/s of weights from L2
MIXES = {"full": (0, 0, 0, 1), "uniform": (0.25, 0.25, 0.25, 0.25), "quarter": (0, 1, 0, 0)}  # of levels 0, 1, 2, 3


class Traffic(NamedTuple):
    """Bytes that the fused kernel moves."""

    loaded: int  # of maps: x for the activations, and what the branch is added to
    stored: int
    streamed: int  # of weights, from L2


def fused_traffic(p: FusedArguments, counts: Sequence[int]) -> Traffic:
    """Traffic of a block that adds to a map, with counts[l] instances at level l.

    Raises ValueError where the fused kernel does not take the block.
    """
    layout = fused_layout(p)
    if layout is None:
        raise ValueError(f"fused_traffic: the problem must be one that the fused kernel takes, got {p}")
    rows, active = -(-p.H // p.stride), sum(counts[1:])
    map_in, map_out = p.itemsize * p.C * p.H * p.W, p.itemsize * p.C_out * rows * -(-p.W // p.stride)
    widths = sum(-(-count // layout.instances) * width for count, width in zip(counts[1:], p.widths, strict=True))
    streamed = -(-rows // layout.rows) * widths * 9 * (p.C + p.C_out) * p.itemsize
    return Traffic(active * (map_in + map_out), active * map_out, streamed)


def problem_of(block: ResidualShape, B: int, multiprocessors: int) -> FusedArguments:
    """The block as a problem in bfloat16 on a Hopper GPU, its hidden groups a quarter, a quarter and a half."""
    widths = tuple(accumulate((block.channels // 4, block.channels // 4, block.channels // 2)))
    size = block.size * block.stride
    chip = multiprocessors, 227 << 10
    return FusedArguments(B, size, size, block.in_channels, block.channels, widths, block.stride, 2, *chip)


class Prediction(NamedTuple):
    """Predicted times in seconds, and the FLOPs ratio."""

    matrix: float  # floor: FLOPs
    fused_bytes: float  # floor: the fused kernel's maps
    dense: float
    composition: float
    fused: float
    flops_ratio: float

    @property
    def realised(self) -> float:
        """Realised fraction of the faster of our two ways: the saving in time over the saving in FLOPs."""
        return self.dense / min(self.composition, self.fused) / self.flops_ratio


def predict(
    block: ResidualShape, mix: str, flops: float, bandwidth: float, B: int = 256, chip: int = 132
) -> Prediction:
    """Predict the times of a block: flops in FLOP/s, bandwidth in bytes/s, chip: number of multiprocessors."""
    p, counts = problem_of(block, B, chip), [round(B * share) for share in MIXES[mix]]
    work = [B * block.flops(p.widths[-1]), sum(n * block.flops(w) for n, w in zip(counts[1:], p.widths, strict=True))]
    traffic = fused_traffic(p, counts)
    maps = (traffic.loaded + traffic.stored) / bandwidth
    rows = p.H // p.stride
    activation = 2 * p.itemsize * p.C * p.H * p.W * sum(counts[1:]) / bandwidth  # read and written
    hidden = 2 * p.itemsize * rows * rows * sum(n * w for n, w in zip(counts[1:], p.widths, strict=True)) / bandwidth
    full = fused_traffic(p, (0, 0, 0, B))
    dense_maps = (full.loaded + full.stored + 2 * p.itemsize * B * rows * rows * p.widths[-1]) / bandwidth
    return Prediction(
        work[1] / flops,
        maps,
        max(work[0] / flops / SHARES["dense"], dense_maps),
        max(work[1] / flops / SHARES["composition"], maps + hidden) + activation,
        max(work[1] / flops / SHARES["fused"], maps, traffic.streamed / L2_BYTES),
        work[0] / work[1],
    )


def table(network: str, flops: float, bandwidth: float, chip: int) -> str:
    """A line for each kind of block and mix, and the sums of the network."""
    backbone, lines = BACKBONES[network], []
    blocks = block_shapes(backbone.stages, backbone.stem, 32)
    for mix in MIXES:
        made = {block: predict(block, mix, flops, bandwidth, chip=chip) for block in blocks}
        for block, one in made.items():
            name = f"{block.in_channels}-{block.channels}x{block.size}x{block.size}/{block.stride}"
            lines.append([name, mix, *(f"{s * 1e6:.0f}" for s in one[:5]), f"{one.realised:.2f}"])
        sums = [sum(made[block][i] for block in blocks) for i in range(5)]
        ours = sum(min(made[block].composition, made[block].fused) for block in blocks)
        ratio = sum(made[b].matrix * made[b].flops_ratio for b in blocks) / sums[0]
        lines.append([f"all {len(blocks)}", mix, *(f"{s * 1e6:.0f}" for s in sums), f"{sums[2] / ours / ratio:.2f}"])
    return markdown(["block", "mix", "matrix", "bytes", "dense", "two", "fused", "realised"], lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_predict", description=__doc__)
    parser.add_argument("--tflops", type=float, default=790, help="measured matrix rate in bfloat16")
    parser.add_argument("--tbps", type=float, default=4.3, help="measured copy bandwidth, read plus written")
    parser.add_argument("--multiprocessors", type=int, default=132)
    options = parser.parse_args()
    for network in ("wrn32_4", "resnet42"):
        print(f"{network}, B = 256, bfloat16, microseconds")
        print(table(network, options.tflops * 1e12, options.tbps * 1e12, options.multiprocessors), end="\n\n")


if __name__ == "__main__":
    main()
