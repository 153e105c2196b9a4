"""A block at inference whose weights are no parameters: what records it has them as constants."""

import torch
from torch import Tensor, nn

from den.nn.blocks.residual import FoldedBlock
from den_kernels import Route, RoutingPlan


class ConstantBlock(nn.Module):
    """A folded block as one call of its op. It has no state_dict, and does not train."""

    def __init__(self, block: FoldedBlock) -> None:
        super().__init__()
        self.weights = block.folded().released()
        self.op, self.op_, self.shortcut = type(block).op, type(block).op_, block.shortcut
        self.eval()

    def forward(self, x: Tensor, route: Route | None = None, *, inplace: bool = False) -> Tensor:
        """x [B, C, H, W] -> [B, C_out, H_out, W_out]; route None: all hidden channels for all; may write over x."""
        if route is None:
            groups = len(self.weights.groups)
            full = torch.full((x.shape[0], 1), groups, dtype=torch.int32, device=x.device)
            route = RoutingPlan.from_levels(full, groups)[0]
        return (self.op_ if inplace else self.op)(x, route, self.weights)
