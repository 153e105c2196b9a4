"""The sort behind a routing plan: for each block, its instances by how many channel groups they use.

On a CPU it is C++ (csrc/plan.cpp), on a CUDA device one kernel for all blocks (csrc/plan.cu); elsewhere, and without
the extension, torch ops. The references are the definition; all agree exactly.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _cuda
from ._extension import extension

PLAN_LEVELS, PLAN_MASKS = "den_kernels::plan_levels", "den_kernels::plan_masks"


def plan_levels_reference(
    levels: Tensor,  # integer [B, N]
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:  # levels int32 [N, B], order int32 [N, B], offsets int32 [N, groups + 2]
    """The definition of `plan_levels`, as plain loops. Levels must be in 0..groups."""
    B, N = levels.shape
    orders, offsets = [], []
    for column in levels.t().tolist():
        order: list[int] = []
        starts = [0]
        for level in range(groups, -1, -1):
            order += [b for b in range(B) if column[b] == level]
            starts.append(len(order))
        orders.append(order)
        offsets.append(starts)
    return levels.t().contiguous().int(), _int32(orders, N, B), _int32(offsets, N, groups + 2)


def plan_masks_reference(
    masks: Tensor,  # bool [B, N, G]
) -> tuple[Tensor, Tensor, Tensor]:  # levels int32 [N, B], order int32 [N, B], offsets int32 [N, B + 1]
    """The definition of `plan_masks`, as plain loops."""
    B, N, _ = masks.shape
    orders, offsets = [], []
    for n in range(N):
        mask = masks[:, n].tolist()
        keys = [(-sum(bits), [not bit for bit in bits]) for bits in mask]
        order = sorted(range(B), key=keys.__getitem__)
        starts = [i for i in range(B) if i == 0 or mask[order[i]] != mask[order[i - 1]]]
        orders.append(order)
        offsets.append(starts + [B] * (B + 1 - len(starts)))
    return masks.sum(2).t().contiguous().int(), _int32(orders, N, B), _int32(offsets, N, B + 1)


def _int32(rows: list[list[int]], *shape: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).reshape(shape)


def plan_levels_torch(
    levels: Tensor,  # integer [B, N]
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:  # levels int32 [N, B], order int32 [N, B], offsets int32 [N, groups + 2]
    """`plan_levels` in torch ops that never wait for the device. Levels are clamped to 0..groups."""
    levels = levels if levels.dtype == torch.int64 else levels.int()
    levels = levels.t().clamp(0, groups).int().contiguous()
    segments, order = (groups - levels).sort(dim=1, stable=True)
    return levels, order.int(), _offsets(segments, groups + 1)


def plan_masks_torch(
    masks: Tensor,  # bool [B, N, G]
) -> tuple[Tensor, Tensor, Tensor]:  # levels int32 [N, B], order int32 [N, B], offsets int32 [N, B + 1]
    """`plan_masks` in torch ops that never wait for the device."""
    masks = masks.transpose(0, 1)
    levels = masks.sum(2, dtype=torch.int32).contiguous()
    words = _mask_words(masks, levels)  # int64 [W, N, B]
    order = torch.arange(levels.shape[1], device=masks.device).expand_as(levels)
    for word in words.flip(0):  # least significant word first: the sort is stable
        order = order.gather(1, word.gather(1, order).argsort(dim=1, descending=True, stable=True))
    words = words.gather(2, order.expand_as(words))
    changes = (words[:, :, 1:] != words[:, :, :-1]).any(dim=0)
    segments = torch.nn.functional.pad(changes.cumsum(1, dtype=torch.int32), (1, 0))[:, : levels.shape[1]]
    return levels, order.int(), _offsets(segments, levels.shape[1])


def _mask_words(
    masks: Tensor,  # bool [N, B, G]
    levels: Tensor,  # int32 [N, B]
) -> Tensor:  # int64 [W, N, B]
    """Sorting keys, most significant word first: the count, then the mask with its first group as the highest bit."""
    N, B, G = masks.shape
    head = 62 - G.bit_length()  # bits of the mask that fit beside the count
    words = -(-max(G - head, 0) // 62)
    bits = torch.nn.functional.pad(masks, (62 - head, head + 62 * words - G)).view(N, B, words + 1, 62)
    places = 2 ** torch.arange(61, -1, -1, device=masks.device)
    keys = (bits * places).sum(3).movedim(2, 0)
    return torch.cat([keys[:1] + (levels.long() << head), keys[1:]])


def _offsets(
    segments: Tensor,  # integer [N, B], ascending: the segment of each place in the order
    count: int,
) -> Tensor:  # int32 [N, count + 1]
    bounds = torch.arange(count + 1, dtype=segments.dtype, device=segments.device)
    bounds = bounds.expand(segments.shape[0], -1).contiguous()
    return torch.searchsorted(segments.contiguous(), bounds, out_int32=True)


def plan_levels(levels: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plan N blocks from levels [B, N]: levels int32 [N, B], order int32 [N, B], offsets int32 [N, groups + 2].

    On a CPU a level outside 0..groups is a ValueError; elsewhere it is clamped.
    """
    if not levels.is_cpu:
        if not _cuda.plans_levels(levels.device, groups):
            return plan_levels_torch(levels, groups)
        plan = _empty_plan(levels, levels.shape[0], levels.shape[1], groups + 1)
        _cuda.plan_levels(levels, groups, *plan)
        return plan
    if extension is None:
        check_levels(levels, groups)
        return plan_levels_torch(levels, groups)
    levels = (levels if levels.dtype == torch.int64 else levels.int()).contiguous()
    B, N = levels.shape
    plan = _empty_plan(levels, B, N, groups + 1)
    extension.plan_levels(levels, groups, *plan)
    return plan


plan_levels_op = torch.library.custom_op(PLAN_LEVELS, plan_levels, mutates_args=())


@plan_levels_op.register_fake
def _(levels: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:  # levels [B, N]
    return _empty_plan(levels, levels.shape[0], levels.shape[1], groups + 1)


@plan_levels_op.register_vmap
def _(info: Any, in_dims: tuple, levels: Tensor, groups: int) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The plans of V batches of levels, [B, N] and an axis V at in_dims[0]."""
    return _plan_stacked(plan_levels_op, levels.movedim(in_dims[0], 1), groups)


def plan_masks(masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Plan N blocks from masks [B, N, G]: levels int32 [N, B], order int32 [N, B], offsets int32 [N, B + 1]."""
    B, N, G = masks.shape
    on_cuda = _cuda.plans_masks(masks.device, G)
    if not on_cuda and (extension is None or not masks.is_cpu):
        return plan_masks_torch(masks)
    levels, order, offsets = _empty_plan(masks, B, N, B)
    if on_cuda:
        _cuda.plan_masks(masks, levels, order, offsets)
        return levels, order, offsets
    extension.plan_masks(masks.transpose(0, 1).contiguous(), levels, order, offsets)
    return levels, order, offsets


plan_masks_op = torch.library.custom_op(PLAN_MASKS, plan_masks, mutates_args=())


@plan_masks_op.register_fake
def _(masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # masks [B, N, G]
    return _empty_plan(masks, masks.shape[0], masks.shape[1], masks.shape[0])


@plan_masks_op.register_vmap
def _(info: Any, in_dims: tuple, masks: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The plans of V batches of masks, [B, N, G] and an axis V at in_dims[0]."""
    return _plan_stacked(plan_masks_op, masks.movedim(in_dims[0], 1))


def _plan_stacked(
    plan: Callable[..., tuple[Tensor, ...]], selections: Tensor, *settings: int
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The plans of V batches, selections [B, V, N, ...], as vmap wants them: one plan of V * N blocks."""
    V, N = selections.shape[1:3]
    made = plan(selections.flatten(1, 2).contiguous(), *settings)
    return tuple(tensor.unflatten(0, (V, N)) for tensor in made), (0, 0, 0)


def _empty_plan(like: Tensor, B: int, N: int, segments: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory on the device of `like` for levels [N, B], order [N, B] and offsets [N, segments + 1], all int32."""
    shapes = ((N, B), (N, B), (N, segments + 1))
    levels, order, offsets = (torch.empty(shape, dtype=torch.int32, device=like.device) for shape in shapes)
    return levels, order, offsets


def check_levels(levels: Tensor, groups: int) -> None:
    """Raise ValueError for the first level [B, N] outside 0..groups. Waits for the device."""
    outside = (levels < 0) | (levels > groups)
    if bool(outside.any()):
        b, n = outside.nonzero()[0].cpu().tolist()
        raise ValueError(
            f"plan_levels: levels must be in 0..{groups}, got {int(levels[b, n])} for instance {b}, block {n}"
        )
