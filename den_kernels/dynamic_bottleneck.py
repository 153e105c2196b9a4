"""The bottleneck block at inference, over only the hidden channel groups that each instance selected.

Equivalent, for an instance whose selected hidden channels are `s`, to

    shortcut(x) + conv3[:, s](relu(bn3(conv2[s, s](relu(bn2(conv1[s](relu(bn1(x)))))))))

and to shortcut(x) where s is empty; of an ordinary ResNet (He et al., 2016, `Bottleneck`) to

    relu(shortcut + bn3(conv3[:, s](relu(bn2(conv2[s, s](relu(bn1(conv1[s](x)))))))))

and relu(shortcut)

(Ahn, Kim, Oh, ICCV 2019, section 3.1, on the block of He et al., CVPR 2016, with the cardinality of Xie et al., CVPR
2017; batch norm with running statistics). The batch norms are folded once, when the weights are prepared: bn1 into an
affine map before ReLU, bn2 and bn3 into conv1 and conv2.

On a CPU one call of C++ (csrc/direct_bottleneck.h) takes an instance through the whole block: float32 with AVX-512 or
AVX2, bfloat16 with AMX. Elsewhere the three convolutions are dynamic ones, on a CPU over the rows of the instances
above level 0 (`_bottleneck_composed.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _bottleneck_composed
from ._block_op import BlockOp, activated, own_shortcut
from ._operands import Operands
from ._residual_cpu import run_direct
from .bottleneck_weights import BottleneckWeights
from .eager import not_scriptable
from .plan import Route, channels_of


def dynamic_bottleneck_reference(
    x: Tensor,  # [B, C, H, W]
    route: Route,
    weights: BottleneckWeights,
    shortcut: Tensor | None = None,  # [B, C_out, H_out, W_out]
) -> Tensor:  # [B, C_out, H_out, W_out]
    """The definition: one instance after the other, the hidden channels that it did not select set to zero."""
    out, used = own_shortcut(x, weights, shortcut), channels_of(route.selection(), weights.groups)
    bias1, bias2 = weights.bias1.to(x.dtype), weights.bias2.to(x.dtype)
    R, S = weights.conv2.shape[2:]
    for b in range(x.shape[0]):
        if not used[b].any():
            continue
        a, chosen = activated(x[b : b + 1], weights), used[b][:, None, None]
        h = torch.where(chosen, F.conv2d(a, weights.conv1, bias1).relu(), 0)
        h = F.conv2d(h, weights.conv2, bias2, weights.stride, (R // 2, S // 2), groups=weights.cardinality)
        bias3 = None if weights.bias3 is None else weights.bias3.to(x.dtype)
        out[b] += F.conv2d(torch.where(chosen, h.relu(), 0), weights.conv3, bias3)[0]
    return out.relu_() if weights.relu else out


def _compute(
    x: Tensor,  # [B, C, H, W] channels-last
    route: Route,
    weights: BottleneckWeights,
    shortcut: Tensor | None,  # [B, C_out, H_out, W_out]; None: the block's own
    inplace: bool,  # the result is written over x
) -> Tensor:  # [B, C_out, H_out, W_out] channels-last
    """The block by the kernels of its device."""
    if weights.direct is not None:
        return run_direct(x, route, weights, shortcut, inplace)
    out = _bottleneck_composed.run(x, route, weights, shortcut, inplace)
    return out.relu_() if weights.relu else out


OPERANDS = Operands(BottleneckWeights)
_OP = BlockOp("dynamic_bottleneck", OPERANDS, dynamic_bottleneck_reference, _compute)


@not_scriptable
def dynamic_bottleneck(
    x: Tensor, selection: Route | Tensor, weights: BottleneckWeights, shortcut: Tensor | None = None
) -> Tensor:
    """A bottleneck block at inference, over the hidden channel groups that each instance selected.

    Args:
        x: [B, C, H, W] float32, float16, bfloat16 (float64 runs the reference); channels-last in memory is fastest. Of
            a post-activation block the output of a ReLU.
        selection: a `Route` of a plan, levels (integer [B]) or a mask (bool [B, G]).
        weights: the folded block, `BottleneckWeights.fold(conv1, bn1, conv2, bn2, conv3, bn3)`.
        shortcut: [B, C_out, H_out, W_out] in x's dtype, of a block whose shortcut has parameters; None: average pooling
            of x by the stride, zero channels added.

    Returns:
        [B, C_out, H_out, W_out] channels-last, with H_out = ceil(H / stride): the shortcut plus the branch, through
        ReLU if the block is post-activation. An instance at level 0 gets exactly the shortcut (through ReLU).

    Raises:
        ValueError: x or shortcut of another shape or device, a selection that does not fit, a gradient is required.
        TypeError: x of another dtype than the weights, shortcut of another than x.
        RuntimeError: inside torch.func, and in forward-mode differentiation.
    """
    return _OP(x, selection, weights, shortcut)


@not_scriptable
def dynamic_bottleneck_(x: Tensor, selection: Route | Tensor, weights: BottleneckWeights) -> Tensor:
    """:func:`dynamic_bottleneck`, in place where the block keeps the shape of `x` [B, C, H, W], else in a new map.

    In place, on a CPU, an instance at level 0 costs nothing: none of its bytes is read or written.
    """
    return _OP.in_place(x, selection, weights)
