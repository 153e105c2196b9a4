"""The residual block as launches of the Triton convolution, compared under load: the same bits in every call.

A register that a matrix product still reads, or shared memory that is overwritten too early, gives wrong values only
where the machine is busy. So many calls of a large block are queued before the first result is looked at.
"""

from __future__ import annotations

import functools
from itertools import product
from typing import Any

import torch
from torch import Tensor

from den_kernels import ResidualWeights, dynamic_residual
from den_kernels.dynamic_residual import dynamic_residual_reference
from den_kernels.plan import Route, as_route
from den_kernels.rows import pool_rows
from den_kernels.testing import make_levels, make_mask

from .gpu_blocks import fold, random_block
from .gpu_numerics import DTYPES, TF32, close_by_instance, numerics
from .gpu_worker import Check, Context, Unavailable

WAYS = ("bfloat16", "float16", "tf32")
CALLS = 20


def checks(context: Context) -> list[Check]:
    """Levels and masks in every type that the matrix units multiply."""
    return [
        Check(f"composition {selection}/{way}", functools.partial(check_composition, selection, way))
        for way, selection in product(WAYS, ("levels", "mask"))
    ]


def composition(x: Tensor, route: Route, weights: ResidualWeights) -> Tensor:
    """The block by Triton alone, also where the fused kernel takes it. Raises Unavailable where Triton is missing."""
    from den_kernels import _triton

    if not _triton.runs_on(x.device):
        raise Unavailable("the Triton kernels do not run here")
    from den_kernels._triton.residual import add_branch

    out = pool_rows(x, weights.conv2.shape[0], weights.stride)
    add_branch(x, out, route, weights)
    return out


def check_composition(selection: str, way: str, context: Context) -> dict[str, Any]:
    """20 calls equal each other bit by bit, and err at most twice as much as PyTorch's own convolutions do.

    Levels go to the Triton launches themselves, masks through `dynamic_residual`, which makes the same launches. An
    instance at level 0 keeps exactly its shortcut.
    """
    torch.manual_seed(0)
    dtype, tf32 = DTYPES[way]
    channels, batch, side = context.size(64, 16), context.size(256, 3), context.size(32, 5)
    block = random_block(channels, channels, (channels // 4, channels // 4, channels // 2), 1)
    chosen = make_mask(batch, 3, seed=2) if selection == "mask" else make_levels("uniform", batch, 3)
    chosen[1] = 0
    x = torch.randn(batch, channels, side, side, device=context.place).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    route, weights = as_route(chosen.to(context.place), 3, batch), fold(block, dtype, context.place)
    call = composition if selection == "levels" else dynamic_residual
    with numerics(tf32), torch.inference_mode():
        results = [call(x, route, weights) for _ in range(context.size(CALLS, 3))]
        peer = dynamic_residual_reference(x, route, weights)
    with numerics(False), torch.inference_mode():
        exact = dynamic_residual_reference(x.double(), route, fold(block, torch.float64, context.place)).cpu()
    first = results[0]
    different = [i for i, result in enumerate(results) if not torch.equal(result, first)]
    assert not different, f"of {len(results)} calls {different} give other bits than call 0"
    idle = ~route.selection().any(1)
    assert torch.equal(first[idle], x[idle]), "an instance at level 0 must be its shortcut"
    allowed = 2 * close_by_instance(peer, exact, float("inf"))
    if way == "tf32":  # PyTorch need not use TF32 where it may
        allowed = max(allowed, 2 * TF32)
    return {"calls": len(results), "relative_error": close_by_instance(first, exact, allowed), "allowed": allowed}
