"""The residual block as launches of the Triton convolution, compared under load: the same bits in every call.

A register that a matrix product still reads, or shared memory that is overwritten too early, gives wrong values only
where the machine is busy. So many calls of a large block are queued before the first result is looked at.
"""

from typing import Any

import pytest
import torch

from den_kernels import dynamic_residual
from den_kernels.dynamic_residual import dynamic_residual_reference
from den_kernels.plan import as_route
from tests.gpu_blocks import choose, composition, fold, random_block
from tests.on_gpu import DTYPES, TF32, Context, close_by_instance, numerics

BATCH, CHANNELS, SIDE, CALLS = 256, 64, 32, 20


@pytest.mark.parametrize("selection", ["levels", "mask"])
@pytest.mark.parametrize("way", ["bfloat16", "float16", "tf32"])
def test_composition(way: str, selection: str, context: Context, record: Any) -> None:
    """Levels go to the Triton launches themselves, masks through `dynamic_residual`, which makes the same launches."""
    record(check_composition(composition if selection == "levels" else dynamic_residual, selection, way, context))


@pytest.mark.smoke
def test_composition_first(context: Context, record: Any) -> None:
    record(check_composition(composition, "levels", "bfloat16", context))


def check_composition(call: Any, selection: str, way: str, context: Context) -> dict[str, Any]:
    """20 calls equal each other bit by bit, and err at most twice as much as PyTorch's own convolutions do.

    An instance at level 0 keeps exactly its shortcut.
    """
    torch.manual_seed(0)
    dtype, tf32 = DTYPES[way]
    channels, batch, side = context.size(CHANNELS, 16), context.size(BATCH, 3), context.size(SIDE, 5)
    block = random_block(channels, channels)
    x = torch.randn(batch, channels, side, side, device=context.place).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    route = as_route(choose(selection, batch).to(context.place), 3, batch)
    weights = fold(block, dtype, context.place)
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
