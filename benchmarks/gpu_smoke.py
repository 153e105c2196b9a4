"""What has to work before anything else is worth its time on a GPU: one problem of every kernel, within a minute."""

from __future__ import annotations

import functools

from den_kernels.testing import ConvProblem

from . import gpu_blocks, gpu_composition, gpu_correctness
from .gpu_worker import Check, Context

CONVOLUTION = ConvProblem(batch=5, channels=(24, 1), out_sizes=(16, 16, 32))
SMALL = ConvProblem(batch=3, size=(5, 4), channels=(8, 1), out_sizes=(8, 8))


def checks(context: Context) -> list[Check]:
    """Plan, fused block, convolution with its gradients, and the block as Triton launches."""
    convolution = SMALL if context.tiny else CONVOLUTION
    return [
        Check("smoke: plan", functools.partial(gpu_blocks.check_plan_of_levels, context.size(257, 5), 3)),
        Check("smoke: fused block", functools.partial(gpu_blocks.check_fused, "bfloat16", 1)),
        Check(
            "smoke: convolution, forward and backward",
            functools.partial(gpu_correctness.check_convolution, convolution, "bfloat16"),
        ),
        Check("smoke: composition", functools.partial(gpu_composition.check_composition, "levels", "bfloat16")),
    ]
