"""What ncu runs, `python -m tests.profiled CASE DEVICE TINY`: one fused block, or the block as Triton launches.

Only what lies between the two calls of the CUDA profiler is measured.
"""

import sys

import torch

from benchmarks.gpu_ways import Unavailable
from den_kernels.plan import as_route
from den_kernels.testing import make_levels
from tests.gpu_blocks import composition, fold, fused, random_block
from tests.on_gpu import Context

SHAPES = {"64x32x32": (64, 32), "128x16x16": (128, 16), "256x8x8": (256, 8)}  # channels and side of a map
WAYS = {"fused": fused, "composition": composition}


@torch.inference_mode()
def main(name: str, device: str, tiny: str) -> int:
    """Run a case three times, the last time measured: 256 images in bfloat16, all levels alike often."""
    torch.manual_seed(0)
    context = Context(device, tiny == "1")
    way, shape = name.split()
    channels, side, batch = (16, 6, 4) if context.tiny else (*SHAPES[shape], 256)
    weights = fold(random_block(channels, channels), torch.bfloat16, context.place)
    x = torch.randn(batch, channels, side, side, device=context.place).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    route = as_route(make_levels("uniform", batch, 3).to(context.place), 3, batch)
    try:
        for _ in range(2):
            WAYS[way](x, route, weights)
    except Unavailable as reason:
        print(f"left out: {reason}", flush=True)
        return 0
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    WAYS[way](x, route, weights)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
