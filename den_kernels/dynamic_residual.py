"""The residual block at inference, over only the hidden channel groups that each instance selected.

Equivalent, for an instance whose selected hidden channels are `s`, to

    shortcut(x) + conv2[:, s](relu(bn2(conv1[s](relu(bn1(x))))))        and to shortcut(x) where s is empty

(Ahn, Kim, Oh, ICCV 2019, section 3.1; batch norm with running statistics). The batch norms are folded once, when the
weights are prepared: bn1 into an affine map that runs with ReLU while rows are gathered, bn2 into conv1. A block of an
ordinary ResNet (He et al., 2016) is

    relu(shortcut + bn2(conv2[:, s](relu(bn1(conv1[s](x))))))        and relu(shortcut) where s is empty

where x is the output of a ReLU, so that an instance at level 0 keeps what it has.

On a CPU an instance at level 0 is not touched, and the others go one of two ways:

- float32 with AVX-512 or AVX2, bfloat16 with AMX or AVX-512 BF16: a direct convolution in C++ (csrc/direct_residual.h,
  dynamic_bf16.h) takes an instance through the whole block while its maps stay in one core's cache. One
  packing of the weights serves all levels and masks, and narrow levels (4 or 8 hidden channels) cost what they hold,
  which they do not with oneDNN.
- else: the instances of a segment go through two dense oneDNN convolutions in chunks that stay in the cache; a row is
  read once (gather, bn1, ReLU) and added to once (scatter).

On a GPU the block is one CUDA kernel (csrc/dynamic_residual.cu) whose hidden map never leaves the chip, where
`_cuda.choose_fused` has a layout for it, else two launches of the Triton convolution, behind a pass that writes
relu(bn1(x)) (`_triton/residual.py`); `_residual_gpu.py` chooses.
"""

import torch.nn.functional as F
from torch import Tensor

from ._block_op import BlockOp, activated, own_shortcut
from ._operands import Operands
from ._residual_cpu import run_direct, run_onednn
from .eager import not_scriptable
from .plan import Route
from .residual_weights import ResidualWeights


def dynamic_residual_reference(
    x: Tensor,  # [B, C, H, W]
    route: Route,
    weights: ResidualWeights,
    shortcut: Tensor | None = None,  # [B, C_out, H_out, W_out]
) -> Tensor:  # [B, C_out, H_out, W_out] channels-last
    """The definition: one instance after the other, its hidden channels selected by hand."""
    out = own_shortcut(x, weights, shortcut)
    selection, whole = route.selection(), weights.all_hidden()
    for b in range(x.shape[0]):
        groups = tuple(selection[b].tolist())
        if any(groups):
            conv1, bias1, conv2 = weights.hidden(groups, whole)
            a = activated(x[b : b + 1].to(conv1.dtype), weights)
            h = F.conv2d(a, conv1, bias1, weights.stride, (conv1.shape[2] // 2, conv1.shape[3] // 2)).relu()
            bias2 = None if weights.bias2 is None else weights.bias2.to(h.dtype)
            out[b] += F.conv2d(h, conv2, bias2, 1, (conv2.shape[2] // 2, conv2.shape[3] // 2))[0].to(out.dtype)
    return out.relu_() if weights.relu else out


def _compute(
    x: Tensor,  # [B, C, H, W] channels-last
    route: Route,
    weights: ResidualWeights,
    shortcut: Tensor | None,  # [B, C_out, H_out, W_out]; None: the block's own
    inplace: bool,  # the result is written over x
) -> Tensor:  # [B, C_out, H_out, W_out] channels-last
    """The block by the kernels of its device."""
    if not x.is_cpu:
        from ._residual_gpu import run

        return run(x, route, weights, shortcut, inplace)
    if weights.direct is not None:
        return run_direct(x, route, weights, shortcut, inplace)
    out = run_onednn(x, route, weights, shortcut, inplace)
    return out.relu_() if weights.relu else out


OPERANDS = Operands(ResidualWeights)
_OP = BlockOp("dynamic_residual", OPERANDS, dynamic_residual_reference, _compute)


@not_scriptable
def dynamic_residual(
    x: Tensor, selection: Route | Tensor, weights: ResidualWeights, shortcut: Tensor | None = None
) -> Tensor:
    """A residual block at inference, over the hidden channel groups that each instance selected.

    Args:
        x: [B, C, H, W] float32, float16, bfloat16 (float64 runs the reference); channels-last in memory is fastest. Of
            a post-activation block the output of a ReLU.
        selection: a `Route` of a plan, levels (integer [B]) or a mask (bool [B, G]).
        weights: the folded block, `ResidualWeights.fold(conv1, bn1, conv2, bn2)`.
        shortcut: [B, C_out, H_out, W_out] in x's dtype, of a block whose shortcut has parameters; None: average pooling
            of x by the stride, zero channels added.

    Returns:
        [B, C_out, H_out, W_out] channels-last, with H_out = ceil(H / stride): the shortcut plus the branch, through
        ReLU if the block is post-activation. An instance at level 0 gets exactly the shortcut (through ReLU).

    Raises:
        ValueError: x or shortcut of another shape or device, a selection that does not fit, a gradient is required.
        TypeError: x of another dtype than the weights, shortcut of another than x.
    """
    return _OP(x, selection, weights, shortcut)


@not_scriptable
def dynamic_residual_(x: Tensor, selection: Route | Tensor, weights: ResidualWeights) -> Tensor:
    """:func:`dynamic_residual`, in place where the block keeps the shape of `x` [B, C, H, W], else in a new map.

    In place, an instance at level 0 costs nothing: none of its bytes is read or written (the ReLU of a post-activation
    block would change none of them).
    """
    return _OP.in_place(x, selection, weights)
