"""What compute-sanitizer runs, `python -m tests.sanitized DEVICE`: small cases for every CUDA kernel.

They reach every template instance: plans of levels and masks, fused blocks in three types, bands, strides, all levels.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import nn

from den_kernels import DynamicConv2d, ResidualWeights, _cuda
from den_kernels.plan import as_route
from den_kernels.plan_sort import plan_levels, plan_masks
from den_kernels.testing import make_levels
from tests.gpu_blocks import random_norm
from tests.on_gpu import BATCH, DTYPES, numerics


class Block(NamedTuple):
    """Channels and map of a fused block, its kind, and how it writes."""

    C: int
    C_out: int
    size: tuple[int, int]
    groups: tuple[int, ...]
    stride: int = 1
    post: bool = False
    in_place: bool = False


BLOCKS = (
    Block(16, 16, (4, 4), (16, 16), in_place=True),  # several maps at a time
    Block(64, 64, (8, 8), (16, 16, 32), in_place=True),
    Block(16, 16, (40, 16), (16, 16), in_place=True),  # bands
    Block(16, 192, (8, 8), (64, 80)),  # 4 columns of warps, the last of them part full
    Block(16, 512, (4, 4), (16, 16)),
    Block(16, 32, (9, 7), (16, 16), stride=2),
    Block(16, 16, (8, 8), (16, 16), post=True, in_place=True),
)


def run_block(block: Block, way: str, device: torch.device) -> bool:
    """A fused block at every level; whether the kernel takes it."""
    dtype, tf32 = DTYPES[way]
    hidden = sum(block.groups)
    conv1 = DynamicConv2d(block.C, hidden, 3, block.stride, 1, bias=False, out_groups=block.groups)
    conv2 = nn.Conv2d(hidden, block.C_out, 3, padding=1, bias=False)
    norms = [random_norm(hidden if block.post else block.C), random_norm(block.C_out if block.post else hidden)]
    convs, norms = [conv.to(device, dtype) for conv in (conv1, conv2)], [norm.to(device) for norm in norms]
    weights = ResidualWeights.fold(convs[0], norms[0], convs[1], norms[1], post_activation=block.post)
    x = torch.rand(BATCH, block.C, *block.size).to(device, dtype).contiguous(memory_format=torch.channels_last)
    levels = make_levels("uniform", BATCH, len(block.groups))
    route = as_route(levels.to(device), len(block.groups), BATCH)
    with numerics(tf32):
        layout = _cuda.layout_of(x, route, weights)
        if layout is None:
            return False
        sides = (-(-side // block.stride) for side in block.size)
        out = x if block.in_place else x.new_zeros(BATCH, *sides, block.C_out).permute(0, 3, 1, 2)
        _cuda.fused_residual(x, out, route, weights, layout, holds_shortcut=block.in_place)
    assert torch.isfinite(out).all(), f"{block} in {way} gives a value that is not finite"
    return True


@torch.no_grad()
def main(device: torch.device) -> int:
    """Run everything once; says how much ran. 1 where a kernel was left out."""
    torch.manual_seed(0)
    for kind in (torch.int32, torch.int64):
        plan_levels(torch.randint(0, 4, (1030, 3), dtype=kind).to(device), 3)
    for groups in (4, 32):
        plan_masks((torch.rand(1030, 2, groups) < 0.5).to(device))
    ran = [run_block(block, way, device) for way in ("bfloat16", "float16", "tf32") for block in BLOCKS]
    print(f"kernels ran: 4 plans, {sum(ran)} of {len(ran)} blocks", flush=True)
    return int(not (all(ran) and _cuda.plans_levels(device, 3) and _cuda.plans_masks(device, 32)))


if __name__ == "__main__":
    sys.exit(main(torch.device(sys.argv[1])))
