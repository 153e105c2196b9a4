"""A graph of gated convolutions on a GPU: a launch for each edge, one before and one behind them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._geometry import Geometry
from ..plan import RoutingPlan
from .convolve import Epilogue, convolve


def run_graph(
    x: Tensor,  # [B, C, H, W] channels-last
    edges: Sequence[tuple[int, int]],  # (i, j), i < j, in the order of j
    weights: Sequence[Tensor],  # [C, C, R, S] of each edge
    biases: Sequence[Tensor],  # [C] of each edge
    plan: RoutingPlan,  # a block of one group for each edge
    read_in: Tensor,  # [B, N]
    gates: Tensor,  # [B, E]
    read_out: Tensor,  # [B, N]
) -> Tensor:  # [B, C, H, W] channels-last
    """The sum of read_out[b, j] v_j over the states v_j, as `den_kernels.dynamic_graph` defines them."""
    (B, C, H, W), N = x.shape, read_in.shape[1]
    R, S = weights[0].shape[2:]
    geometry = Geometry((1, 1), (R // 2, S // 2), (1, 1), 1, (C,), ())
    pixels = x.permute(0, 2, 3, 1)
    states = pixels[None] * read_in.t()[:, :, None, None, None]  # [N, B, H, W, C]
    maps = states.permute(0, 1, 4, 2, 3).unbind(0)
    for (i, j), weight, bias, gate, route in zip(edges, weights, biases, gates.unbind(1), plan, strict=True):
        convolve(maps[i], weight, maps[j], route, geometry, epilogue=Epilogue(bias, add=True, gate=gate))
    flat = states.view(N, B, H * W * C).transpose(0, 1)
    return torch.bmm(read_out[:, None], flat).view(B, H, W, C).permute(0, 3, 1, 2)
