"""The residual block by the fused kernel alone, or by the Triton launches alone, wherever `dynamic_residual` goes."""

from torch import Tensor

from den_kernels import ResidualWeights, _cuda
from den_kernels.plan import Route


class Unavailable(Exception):
    """Raised where this machine lacks what a check or a provider needs; the message says what."""


def fused_branch(x: Tensor, out: Tensor, route: Route, weights: ResidualWeights, *, onto: bool = True) -> None:
    """Run the extension's fused kernel: out += branch(x), or, not `onto`, out = shortcut(x) + branch(x).

    x: [B, C, H, W], out: [B, C', H', W'], both channels-last.  Raises Unavailable where the kernel cannot run.
    """
    layout = _cuda.layout_of(x, route, weights)
    if layout is None:
        raise Unavailable("the fused kernel does not take this block here")
    _cuda.fused_residual(x, out, route, weights, layout, holds_shortcut=onto)


def composed_branch(x: Tensor, out: Tensor, route: Route, weights: ResidualWeights) -> None:
    """Run Triton's launches: out += branch(x), also where the fused kernel takes the block.

    x: [B, C, H, W], out: [B, C', H', W'], both channels-last.  Raises Unavailable where Triton does not run.
    """
    from den_kernels import _triton

    if not _triton.runs_on(x.device):
        raise Unavailable("the Triton kernels do not run here")
    from den_kernels._triton.residual import add_branch

    add_branch(x, out, route, weights)
