"""The inverted residual block at inference, over only the hidden channel groups that each instance selected.

Equivalent, for an instance whose selected hidden channels are `s`, to

    h = act(bn2(conv2[s](act(bn1(conv1[s](x))))))         conv2 depthwise
    g = gate(excite[s](act_s(squeeze[:, s](mean(h)))))    with squeeze and excitation, else 1
    x + bn3(conv3[:, s](g * h))                           without x where the block changes the shape of the map

and to x, or 0, where s is empty (Ahn, Kim, Oh, ICCV 2019, section 3.1, on the blocks of Sandler et al., MobileNetV2,
CVPR 2018, and Tan, Le, EfficientNet, ICML 2019; batch norm with running statistics). The batch norms are folded once,
when the weights are prepared. Without conv2 it is a pair of 1 x 1 convolutions, as in the MLP of ConvNeXt.

On a CPU one call of C++ takes an instance through the whole block in float32, with AVX-512 or AVX2
(csrc/direct_inverted_residual.h); 16-bit maps of blocks with a conv2 are widened around it. Elsewhere the convolutions
are dynamic ones (`_inverted_residual_composed.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _inverted_residual_composed
from ._block_op import BlockOp, empty_result
from ._operands import Operands
from .activations import ACTIVATIONS
from .eager import not_scriptable
from .inverted_residual_weights import InvertedResidualWeights
from .plan import Route, channels_of


def _shortcut(x: Tensor, weights: InvertedResidualWeights, shortcut: Tensor | None) -> Tensor:
    """The map [B, C_out, H_out, W_out] that the branch of x [B, C, H, W] is added to, in memory of its own."""
    given = x if shortcut is None and weights.skip else shortcut
    if given is not None:
        return given.clone(memory_format=torch.channels_last)
    return empty_result(x, weights).zero_()


def dynamic_inverted_residual_reference(
    x: Tensor,  # [B, C, H, W]
    route: Route,
    weights: InvertedResidualWeights,
    shortcut: Tensor | None = None,  # [B, C_out, H_out, W_out]
) -> Tensor:  # [B, C_out, H_out, W_out]
    """The definition: one instance after the other, the hidden channels that it did not select set to zero."""
    out, used = _shortcut(x, weights, shortcut), channels_of(route.selection(), weights.groups)
    act, gate = ACTIVATIONS[weights.activation], ACTIVATIONS[weights.gate_activation]

    def conv(h: Tensor, weight: Tensor, bias: Tensor | None, **settings: int | tuple[int, int]) -> Tensor:
        return F.conv2d(h, weight, None if bias is None else bias.to(x.dtype), **settings)  # type: ignore[arg-type]

    for b in range(x.shape[0]):
        if not used[b].any():
            continue
        h, chosen = x[b : b + 1], used[b][:, None, None]
        if weights.conv1 is not None:
            h = act(conv(h, weights.conv1, weights.bias1))
        if weights.conv2 is not None:
            (R, S), M = weights.kernel, len(weights.conv2)
            padding = R // 2, S // 2
            h = act(conv(h, weights.conv2, weights.bias2, stride=weights.stride, padding=padding, groups=M))
        h = torch.where(chosen, h, 0)
        if weights.squeeze is not None and weights.excite is not None:
            squeezed = conv(h.mean((2, 3), keepdim=True), weights.squeeze, weights.squeeze_bias)
            squeezed = ACTIVATIONS[weights.squeeze_activation](squeezed)
            h = h * gate(conv(squeezed, weights.excite, weights.excite_bias))
        out[b] += conv(h, weights.conv3, weights.bias3)[0]
    return out


def _compute(
    x: Tensor,  # [B, C, H, W] channels-last
    route: Route,
    weights: InvertedResidualWeights,
    shortcut: Tensor | None,  # [B, C_out, H_out, W_out]; None: x where the block adds it, else 0
    inplace: bool,  # the result is written over x
) -> Tensor:  # [B, C_out, H_out, W_out] channels-last
    """The block by the kernels of its device."""
    if weights.direct is None:
        branch = _inverted_residual_composed.branch(x, route, weights)
        given = x if shortcut is None and weights.skip else shortcut
        result = (branch if given is None else branch + given).contiguous(memory_format=torch.channels_last)
        return x.copy_(result) if inplace else result
    if shortcut is None and weights.skip:
        shortcut = x
    elif shortcut is not None:
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
    out = x if inplace else empty_result(x, weights)
    weights.handle(x, shortcut, out, (route.groups, route.order, route.offsets, route.mask))
    return out


OPERANDS = Operands(InvertedResidualWeights)
_OP = BlockOp("dynamic_inverted_residual", OPERANDS, dynamic_inverted_residual_reference, _compute)


@not_scriptable
def dynamic_inverted_residual(
    x: Tensor, selection: Route | Tensor, weights: InvertedResidualWeights, shortcut: Tensor | None = None
) -> Tensor:
    """An inverted residual block at inference, over the hidden channel groups that each instance selected.

    Args:
        x: [B, C, H, W] float32, float16, bfloat16 (float64 runs the reference); channels-last in memory is fastest.
        selection: a `Route` of a plan, levels (integer [B]) or a mask (bool [B, G]).
        weights: the folded block, `InvertedResidualWeights.fold(conv1, bn1, conv2, bn2, conv3, bn3, ...)`.
        shortcut: [B, C_out, H_out, W_out] in x's dtype, what the branch is added to; None: x where the block adds it
            (`skip`), else nothing.

    Returns:
        [B, C_out, H_out, W_out] channels-last, with H_out = ceil(H / stride). An instance at level 0 gets exactly what
        the branch is added to, or 0.

    Raises:
        ValueError: x or shortcut of another shape or device, a selection that does not fit, a gradient is required.
        TypeError: x of another dtype than the weights, shortcut of another than x.
        RuntimeError: inside torch.func, and in forward-mode differentiation.
    """
    return _OP(x, selection, weights, shortcut)


@not_scriptable
def dynamic_inverted_residual_(x: Tensor, selection: Route | Tensor, weights: InvertedResidualWeights) -> Tensor:
    """:func:`dynamic_inverted_residual`, in place where the block keeps the shape of `x` [B, C, H, W], else a new map.

    In place, on a CPU, in float32, an instance at level 0 of a block that adds x costs nothing: it is not touched.
    """
    return _OP.in_place(x, selection, weights)
