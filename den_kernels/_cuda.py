"""The CUDA C++ kernels of the extension: tests of the problems that they take, and their launchers."""

from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _triton
from ._cuda_layout import FusedArguments, FusedLayout, fused_layout
from ._cuda_support import runs_on
from ._extension import extension
from ._triton import strips
from .float32 import allows_tf32

if TYPE_CHECKING:
    from .plan import Route
    from .residual_weights import ResidualWeights

_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_layout = lru_cache(maxsize=1024)(fused_layout)


def _stream(tensor: Tensor) -> int:
    """The address of the current stream of the device of tensor [...]."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def plans_levels(device: torch.device, groups: int) -> bool:
    """True where `plan_levels` runs on the device: a counter for each warp and level must fit in shared memory."""
    return runs_on(device) and groups <= extension.plan_groups_cuda


def plans_masks(device: torch.device, groups: int) -> bool:
    """True where `plan_masks` runs on the device: it holds a mask in one word."""
    return runs_on(device) and groups <= extension.plan_mask_groups_cuda


def plan_levels(levels: Tensor, groups: int, rows: Tensor, order: Tensor, offsets: Tensor) -> None:
    """Plan from levels [B, N] (csrc/plan.cu) into rows, order [N, B] and offsets [N, groups + 2]."""
    levels = levels if levels.dtype == torch.int64 else levels.int()
    (B, N), (stride_b, stride_n) = levels.shape, levels.stride()
    run = extension.plan_levels_int64_cuda if levels.dtype == torch.int64 else extension.plan_levels_int32_cuda
    outputs = rows.data_ptr(), order.data_ptr(), offsets.data_ptr()
    with torch.cuda.device(levels.device):
        run(levels.data_ptr(), stride_b, stride_n, B, N, groups, *outputs, _stream(levels))


def plan_masks(masks: Tensor, levels: Tensor, order: Tensor, offsets: Tensor) -> None:
    """Plan from masks [B, N, G] (csrc/plan.cu) into levels, order [N, B] and offsets [N, B + 1]."""
    B, N, G = masks.shape
    rows = masks.transpose(0, 1).contiguous()
    outputs = levels.data_ptr(), order.data_ptr(), offsets.data_ptr()
    with torch.cuda.device(masks.device):
        extension.plan_masks_cuda(rows.data_ptr(), B, N, G, *outputs, _stream(masks))


def choose_fused(x: Tensor, route: "Route", weights: "ResidualWeights") -> FusedLayout | None:
    """The layout of the fused residual block for x [B, C, H, W]; None where it does not run or should not win."""
    layout = layout_of(x, route, weights)
    if layout is None or not layout.is_worth(_problem(x, weights)):
        return None
    device: Any = torch.cuda.get_device_properties(x.device)
    size = -(-x.shape[2] // weights.stride), -(-x.shape[3] // weights.stride)
    arch = device.major * 10 + device.minor
    problem = tuple(weights.groups), weights.conv2.shape[0], size, weights.stride, x.dtype, arch
    return None if _triton.HAS_TRITON and strips.take_block(*problem) else layout


def layout_of(
    x: Tensor,  # [B, C, H, W]
    route: "Route",
    weights: "ResidualWeights",
) -> FusedLayout | None:
    """The layout of the fused residual block, None where it does not take the problem.

    It takes routes of levels, 3 x 3 kernels, channels-last maps and weights; float32 where TF32 is allowed.
    """
    if not runs_on(x.device) or x.dtype not in _TYPES or route.mask is not None:
        return None
    if x.dtype == torch.float32 and not allows_tf32():
        return None
    convolutions = weights.conv1, weights.conv2
    if any(tuple(conv.shape[2:]) != (3, 3) for conv in convolutions):
        return None
    if not all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, *convolutions)):
        return None
    if any(t.data_ptr() % 16 for t in (x, *convolutions)):
        return None
    return _layout(_problem(x, weights))


def _problem(x: Tensor, weights: "ResidualWeights") -> FusedArguments:  # x [B, C, H, W]
    device: Any = torch.cuda.get_device_properties(x.device)
    widths = tuple(accumulate(weights.groups))
    B, C, H, W = x.shape
    chip = device.multi_processor_count, device.shared_memory_per_block_optin
    return FusedArguments(B, H, W, C, weights.conv2.shape[0], widths, weights.stride, x.itemsize, *chip)


def addresses_of(weights: "ResidualWeights") -> tuple[int, ...]:
    """Addresses of scale1, shift1, conv1, scale2, bias1, conv2 and bias2 (0: None), as the fused kernel reads them.

    Raises ValueError for sizes, devices or layouts, TypeError for dtypes that are not those of the kernel.
    """
    (C_out, M), C, conv1 = weights.conv2.shape[:2], weights.conv1.shape[1], weights.conv1
    vectors = {"scale1": C, "shift1": C, "scale2": M, "bias1": M, "bias2": C_out}
    wanted = {"conv1": (conv1.dtype, (M, C, 3, 3)), "conv2": (conv1.dtype, (C_out, M, 3, 3))}
    for name in ("scale1", "shift1", "conv1", "scale2", "bias1", "conv2", "bias2"):
        tensor = getattr(weights, name)
        if tensor is None and name in ("scale1", "shift1", "bias2"):
            continue
        dtype, shape = wanted.get(name) or (torch.float32, (vectors[name],))
        if tensor.dtype != dtype:
            raise TypeError(f"dynamic_residual: {name} must be {dtype}, got {tensor.dtype}")
        format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        fits = tensor.shape == shape and tensor.device == conv1.device and tensor.is_contiguous(memory_format=format)
        if not fits:
            got = f"{list(tensor.shape)} on {tensor.device} with strides {tensor.stride()}"
            raise ValueError(f"dynamic_residual: {name} must be {list(shape)} on {conv1.device}, {format}, got {got}")
    operands = (weights.scale1, weights.shift1, conv1, weights.scale2, weights.bias1, weights.conv2, weights.bias2)
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in operands)


def fused_residual(
    x: Tensor,  # [B, C, H, W] channels-last
    out: Tensor,  # [B, C_out, Ho, Wo] channels-last
    route: "Route",
    weights: "ResidualWeights",
    layout: FusedLayout,
    *,
    holds_shortcut: bool,
) -> None:
    """out = shortcut(x) + branch(x), of a post-activation block through ReLU, in one launch (csrc/dynamic_residual.cu).

    holds_shortcut: `out` holds the shortcut already (it may be `x`), and instances at level 0 are not touched; else the
    kernel writes the averaged, zero-padded shortcut.
    """
    B, C, H, W = x.shape
    C_out, Ho, Wo = out.shape[1:]
    addresses = [*(t.data_ptr() for t in (x, out, route.order, route.offsets)), *weights.addresses]
    sizes = [B, H, W, C, Ho, Wo, C_out, weights.conv1.shape[0], weights.stride]
    widths = [0, *accumulate(weights.groups)]
    with torch.cuda.device(x.device):
        extension.fused_residual_cuda(
            _TYPES[x.dtype], sizes, widths, addresses, holds_shortcut, weights.relu, list(layout), _stream(x)
        )
