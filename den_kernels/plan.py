"""Routing plans: for each block, the instances of a batch sorted by the channel groups that they use.

A plan is made once, outside autograd, before the first block; all layers of a block share its route. It holds device
tensors of fixed shapes, so building one on a GPU never waits for the device, and a captured CUDA graph follows new
contents written by `RoutingPlan.update_`.

    levels of a block, G = 2     [1, 0, 2, 1, 2]
    order                        [2, 4, 0, 3, 1]     instances 2 and 4 use two groups, 0 and 3 one, 1 none
    offsets                      [0, 2, 4, 5]        segment s is order[offsets[s]:offsets[s + 1]], of level G - s
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Self

import torch
from torch import Tensor

from ._extension import extension
from .eager import call_op, in_range, is_ordinary, is_traced, runs_eagerly
from .plan_sort import (
    PLAN_LEVELS,
    PLAN_MASKS,
    check_levels,
    plan_levels,
    plan_levels_op,
    plan_masks,
    plan_masks_op,
)

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Route:
    """The plan of one block: its instances, sorted by the channel groups that they use."""

    levels: Tensor
    """int32 [B]: groups in use (of a mask: how many are selected)."""
    order: Tensor
    """int32 [B]: instances sorted by level, descending and stable. Of masks: equal masks stand together (count
    descending, then bits descending with the first group first, then instance)."""
    offsets: Tensor
    """int32 [S + 1]: segment s is order[offsets[s]:offsets[s + 1]]. Of levels: S = G + 1, and segment s holds level
    G - s. Of masks: S = B, one segment for each distinct mask, trailing segments empty."""
    groups: int
    """G: channel groups of the block."""
    mask: Tensor | None = None
    """bool [B, G] of a route made from masks."""

    def active(self) -> "Route":
        """A route of one group for these instances: level 1 where any group is in use. Nothing is sorted again, so
        within its segment the order is this route's."""
        if self.mask is None:
            offsets = torch.cat([self.offsets[:1], self.offsets[self.groups :]])
        else:
            used = (self.levels > 0).sum(0, keepdim=True, dtype=torch.int32)
            offsets = torch.cat([self.offsets[:1], used, self.offsets[-1:]])
        return Route(self.levels.clamp(max=1), self.order, offsets, 1)

    def selection(self) -> Tensor:
        """bool [B, G]: the groups that each instance uses."""
        if self.mask is not None:
            return self.mask
        return self.levels[:, None] > torch.arange(self.groups, device=self.levels.device)


@dataclass(frozen=True, eq=False)
class RoutingPlan:
    """The routes of all N blocks for one batch. `plan[i]` is the route of block i.

    Build it with `from_levels` or `from_masks`. A plan shares no memory with what it was made from.
    """

    levels: Tensor
    """int32 [B, N], each block's levels contiguous."""
    order: Tensor
    """int32 [N, B]"""
    offsets: Tensor
    """int32 [N, S + 1]"""
    groups: int
    """G: channel groups of every block."""
    masks: Tensor | None = None
    """bool [B, N, G], each block's masks contiguous."""

    @classmethod
    def from_levels(
        cls,
        levels: Tensor,  # integer [B, N], 0..groups: instance b uses the first levels[b, n] groups of block n
        groups: int | None = None,
        *,
        check: bool = False,
    ) -> Self:
        """Plan from levels.

        `groups=None` takes the highest level found (at least 1) on a CPU; elsewhere, and inside torch.compile, it is a
        ValueError, because finding it would wait for the device. A level out of range is a ValueError on a CPU;
        elsewhere it is clamped, unless `check=True` asks to wait for the device and check.
        """
        if not isinstance(levels, Tensor) or levels.dtype not in _INTEGERS:
            raise TypeError(_not_levels("RoutingPlan.from_levels: levels", levels))
        if levels.ndim != 2:
            raise ValueError(f"RoutingPlan.from_levels: levels must be [B, N], got {list(levels.shape)}")
        if groups is None:
            groups = _highest_level(levels)
        elif groups < 1:
            raise ValueError(f"RoutingPlan.from_levels: groups must be at least 1, got {groups}")
        if check and not levels.is_cpu:
            check_levels(levels, groups)
        rows, order, offsets = (
            in_range(PLAN_LEVELS, plan_levels, levels, groups)
            if runs_eagerly(levels)
            else call_op(plan_levels_op, levels, groups)
        )
        return cls(rows.t(), order, offsets, groups)

    @classmethod
    def from_masks(
        cls,
        masks: Tensor,  # bool [B, N, G]: instance b uses group g of block n where masks[b, n, g]
    ) -> Self:
        """Plan from masks: any subset of the groups. TypeError for another dtype, ValueError for another rank."""
        if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
            got = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
            raise TypeError(f"RoutingPlan.from_masks: masks must be a bool tensor, got {got}")
        if masks.ndim != 3 or masks.shape[2] < 1:
            raise ValueError(
                f"RoutingPlan.from_masks: masks must be [B, N, G] with at least one group, got {list(masks.shape)}"
            )
        own = masks.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
        rows, order, offsets = (
            in_range(PLAN_MASKS, plan_masks, own) if runs_eagerly(own) else call_op(plan_masks_op, own)
        )
        return cls(rows.t(), order, offsets, masks.shape[2], own)

    def __len__(self) -> int:
        return self.order.shape[0]

    def __getitem__(self, i: int) -> Route:
        if not -len(self) <= i < len(self):
            raise IndexError(f"RoutingPlan: block must be in 0..{len(self) - 1}, got {i}")
        mask = None if self.masks is None else self.masks[:, i]
        return Route(self.levels[:, i], self.order[i], self.offsets[i], self.groups, mask)

    def __iter__(self) -> Iterator[Route]:
        masks = repeat(None) if self.masks is None else self.masks.unbind(1)
        for levels, order, offsets, mask in zip(self.levels.unbind(1), self.order, self.offsets, masks, strict=False):
            yield Route(levels, order, offsets, self.groups, mask)

    def part(self, blocks: range) -> Self:
        """The plan of consecutive blocks of this one, in the same memory."""
        if len(blocks) == len(self):
            return self
        start, end = blocks.start, blocks.stop
        masks = None if self.masks is None else self.masks[:, start:end]
        return type(self)(self.levels[:, start:end], self.order[start:end], self.offsets[start:end], self.groups, masks)

    @property
    def batch_size(self) -> int:
        return self.order.shape[1]

    def idle(self) -> list[bool]:
        """True for each of the N blocks that no instance uses; False for all on a GPU, where looking would wait."""
        if not self.levels.is_cpu or not is_ordinary(self.levels) or self.batch_size == 0:
            return [False] * len(self)
        used: list[int] = self.levels.amax(0).tolist()
        return [level == 0 for level in used]

    def to(self, device: torch.device | str) -> Self:
        """Copy the plan to another device."""
        masks = None if self.masks is None else self.masks.to(device)
        return replace(
            self,
            levels=self.levels.to(device),
            order=self.order.to(device),
            offsets=self.offsets.to(device),
            masks=masks,
        )

    def update_(self, levels_or_masks: Tensor) -> Self:
        """Plan anew in the same memory, so that a captured CUDA graph sees it at its next replay.

        levels_or_masks: levels [B, N] or masks [B, N, G], whichever the plan was made from. Raises ValueError for
        another shape or device.
        """
        old = self.levels if self.masks is None else self.masks
        new = levels_or_masks
        if isinstance(new, Tensor) and (new.shape != old.shape or new.device != old.device):
            raise ValueError(
                f"RoutingPlan.update_: argument must be {list(old.shape)} on {old.device}, "
                f"got {list(new.shape)} on {new.device}"
            )
        made = self.from_levels(new, self.groups) if self.masks is None else self.from_masks(new)
        self.levels.copy_(made.levels)
        self.order.copy_(made.order)
        self.offsets.copy_(made.offsets)
        if self.masks is not None and made.masks is not None:
            self.masks.copy_(made.masks)
        return self


def _not_levels(name: str, got: object) -> str:
    kind = got.dtype if isinstance(got, Tensor) else type(got).__name__
    hint = "; masks of groups go to from_masks" if kind == torch.bool else ""
    return f"{name} must be an integer tensor, got {kind}{hint}"


def _highest_level(levels: Tensor) -> int:  # [B, N]
    if not levels.is_cpu or is_traced():
        where = levels.device if not levels.is_cpu else "levels of a traced call"
        raise ValueError(
            f"RoutingPlan.from_levels: groups must be given here (finding the highest level would wait for the data), "
            f"got None for {where}"
        )
    return max(1, int(levels.max())) if levels.numel() else 1


def as_route(
    selection: Route | Tensor,
    groups: int,
    batch: int,
) -> Route:
    """The route that a layer's `selection` argument means.

    A Route is checked and returned; integer levels [B] and a bool mask [B, G] are planned. Raises ValueError for a
    wrong number of groups or instances or, on a CPU, a level out of 0..groups; TypeError for anything else.
    """
    if isinstance(selection, Route):
        if selection.groups != groups:
            raise ValueError(f"route: groups must be {groups}, got {selection.groups}")
        if selection.order.shape[0] != batch:
            raise ValueError(f"route: instances must be {batch}, got {selection.order.shape[0]}")
        return selection
    if isinstance(selection, Tensor) and selection.dtype == torch.bool:
        if selection.shape != (batch, groups):
            raise ValueError(f"route: a mask must be [{batch}, {groups}], got {list(selection.shape)}")
        return RoutingPlan.from_masks(selection[:, None])[0]
    if not isinstance(selection, Tensor) or selection.dtype not in _INTEGERS:
        raise TypeError(_not_levels("route: selection (a Route, levels [B] or a bool mask [B, G])", selection))
    if selection.shape != (batch,):
        raise ValueError(f"route: levels must be [{batch}], got {list(selection.shape)}")
    return RoutingPlan.from_levels(selection[:, None], groups)[0]


def route_for(x: Tensor, selection: Route | Tensor, groups: int, op: str) -> Route:
    """:func:`as_route` for the instances of `x` [B, ...], on its device: what every op calls with its selection.

    Raises, beyond what `as_route` does, ValueError for a selection on another device and for a route whose tensors are
    not those of a plan. On a CPU the kernels check the values as well; on a GPU that would wait for the device.
    """
    if isinstance(selection, Route) and selection.groups == groups and selection.order.shape[0] == x.shape[0]:
        route = selection
    else:
        route = as_route(selection, groups, x.shape[0])
    order = route.order
    if not (x.is_cpu and order.is_cpu) and (order.device != x.device or route.levels.device != x.device):
        raise ValueError(f"{op}: selection must be on {x.device} as x is, got {route.levels.device}")
    if isinstance(selection, Route) and not (x.is_cpu and extension is not None):
        _check_route(route, x.shape[0], op)
    return route


def _check_route(route: Route, batch: int, op: str) -> None:
    """Raises ValueError for a route whose tensors have not the dtypes, sizes and place of a plan's."""
    segments = route.groups + 1 if route.mask is None else batch
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    wanted = {"levels": (torch.int32, (batch,)), "order": (torch.int32, (batch,))}
    wanted |= {"offsets": (torch.int32, (segments + 1,)), "mask": (torch.bool, (batch, route.groups))}
    for name, (dtype, shape) in wanted.items():
        tensor = getattr(route, name)
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.shape != shape or tensor.device != route.order.device:
            got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{op}: route.{name} must be {dtype} {list(shape)} on {route.order.device}, got {got}")
        if name != "levels" and not tensor.is_contiguous():
            raise ValueError(f"{op}: route.{name} must be contiguous, got strides {tensor.stride()}")


def channels_of(
    selection: Tensor,  # bool [B, G]
    sizes: Sequence[int],  # of the G channel groups; () where all channels belong to all instances
    channels: int | None = None,  # needed without sizes
) -> Tensor:  # bool [B, C]
    """The channels that each instance selected: each group's column, as often as the group has channels."""
    if not sizes:
        assert channels is not None
        return selection.new_ones((), dtype=torch.bool).expand(selection.shape[0], channels)
    return torch.cat([selection[:, g : g + 1].expand(-1, size) for g, size in enumerate(sizes)], dim=1)


torch.export.register_dataclass(Route, serialized_type_name="den_kernels.Route")
torch.export.register_dataclass(RoutingPlan, serialized_type_name="den_kernels.RoutingPlan")
