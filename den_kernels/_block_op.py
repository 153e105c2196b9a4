"""A residual block at inference as an op: `name` makes a new map, `name_` writes over x where that keeps its shape.

Both are registered once with torch.library, from one named tuple of operands. An ordinary call without gradients runs
the plain function.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ._operands import Operands
from .eager import call_op, in_range, refuse_symbols, refuse_training, runs_eagerly
from .plan import Route, route_for
from .rows import pool_rows


class BlockWeights(Protocol):
    """Weights of a block of any kind, by the fields that its op reads."""

    @property
    def groups(self) -> tuple[int, ...]:
        """The sizes of the hidden channel groups."""

    @property
    def first(self) -> Tensor:
        """A weight [_, C, R, S] that reads the channels of x, of the dtype and on the device of the maps."""

    @property
    def out_channels(self) -> int:
        """The channels of the result."""

    @property
    def stride(self) -> int:
        """The pixels of x to one of the result, on either axis."""


Compute = Callable[[Tensor, Route, Any, Tensor | None, bool], Tensor]
Reference = Callable[[Tensor, Route, Any, Tensor | None], Tensor]


def out_shape(x: Tensor, channels: int, stride: int) -> tuple[int, int, int, int]:
    """[B, channels, ceil(H / stride), ceil(W / stride)] of x [B, C, H, W]."""
    B, _, H, W = x.shape
    return B, channels, -(-H // stride), -(-W // stride)


def keeps_shape(x: Tensor, weights: BlockWeights) -> bool:
    """True where the block's result is as large as x [B, C, H, W]."""
    return weights.stride == 1 and weights.out_channels == x.shape[1]


def own_shortcut(x: Tensor, weights: BlockWeights, shortcut: Tensor | None = None) -> Tensor:
    """The block's shortcut for x [B, C, H, W] in memory of its own, channels-last.

    That is the given one, [B, C_out, H_out, W_out], else :func:`pool_rows` of x.
    """
    if shortcut is None:
        return pool_rows(x, weights.out_channels, weights.stride)
    return shortcut.clone(memory_format=torch.channels_last)


def activated(x: Tensor, weights: Any) -> Tensor:
    """relu(bn1(x)) [B, C, H, W], in the dtype of x, of a block's weights; x itself where the block has no bn1."""
    if weights.scale1 is None:
        return x
    return (x * weights.scale1[:, None, None] + weights.shift1[:, None, None]).relu().to(x.dtype)


class BlockOp:
    """The ops of one kind of block, called as `op(x, selection, weights, shortcut)` and `op.in_place(x, ...)`.

    operands: what the registered ops take behind x, for a route and weights.
    reference(x, route, weights, shortcut): the definition; runs float64.
    compute(x, route, weights, shortcut, inplace): the block for x channels-last, through the kernels of its device.
    shortcut None is the block's own, without parameters; `inplace`, of that one only, writes the result over x.
    """

    def __init__(self, name: str, operands: Operands, reference: Reference, compute: Compute) -> None:
        self.short, self.name, self.operands = name, f"den_kernels::{name}", operands
        self._reference, self._compute = reference, compute
        count = len(operands)

        def functional(x: Tensor, *given: Any) -> Tensor:  # [B, C, H, W] -> [B, C_out, H_out, W_out]
            return self.functional(x, operands.route(given[:count]), operands.weights(given[:count]), *given[count:])

        def in_place(x: Tensor, *given: Any) -> None:  # [B, C, H, W], written over
            self.over(x, operands.route(given), operands.weights(given))

        custom_op = torch.library.custom_op
        self.functional_op = custom_op(
            self.name, functional, mutates_args=(),
            schema=f"(Tensor x, {operands.text}, Tensor? shortcut=None) -> Tensor",
        )  # fmt: skip
        self.functional_op.register_fake(lambda x, *given: empty_result(x, operands.weights(given[:count])))
        self.in_place_op = custom_op(
            f"{self.name}_", in_place, mutates_args=("x",), schema=f"(Tensor(a!) x, {operands.text}) -> ()"
        )

    def functional(
        self,
        x: Tensor,  # [B, C, H, W]
        route: Route,
        weights: Any,
        shortcut: Tensor | None = None,  # [B, C_out, H_out, W_out]
    ) -> Tensor:  # [B, C_out, H_out, W_out] channels-last
        """The block's result in memory of its own."""
        x = x.contiguous(memory_format=torch.channels_last)
        if x.dtype == torch.float64:
            return self._reference(x, route, weights, shortcut)
        return self._compute(x, route, weights, shortcut, False)

    def over(self, x: Tensor, route: Route, weights: Any) -> None:
        """Write the block's result, which has the shape of x [B, C, H, W], over x."""
        if x.dtype == torch.float64 or not x.is_contiguous(memory_format=torch.channels_last):
            x.copy_(self.functional(x, route, weights))
        else:
            self._compute(x, route, weights, None, True)

    def __call__(
        self,
        x: Tensor,  # [B, C, H, W]
        selection: Route | Tensor,  # route, levels [B] or mask [B, G]
        weights: BlockWeights,
        shortcut: Tensor | None = None,  # [B, C_out, H_out, W_out]
    ) -> Tensor:  # [B, C_out, H_out, W_out] channels-last
        """The block's result in memory of its own; raises for arguments that do not fit or need a gradient."""
        route = self._checked(x, selection, weights)
        if shortcut is not None:
            self._check_shortcut(x, weights, shortcut)
        if runs_eagerly(x, shortcut):
            return in_range(self.name, self.functional, x, route, weights, shortcut)
        refuse_training(self.short, x=x, shortcut=shortcut)
        return call_op(self.functional_op, x, *self.operands.of(route, weights), shortcut)

    def in_place(self, x: Tensor, selection: Route | Tensor, weights: BlockWeights) -> Tensor:
        """Write the block's result over x [B, C, H, W] and return x; a new map where the block changes the shape.

        selection: a route, levels [B] or a mask [B, G].
        """
        route = self._checked(x, selection, weights)
        if not keeps_shape(x, weights):
            return self(x, route, weights)
        if runs_eagerly(x):
            in_range(f"{self.name}_", self.over, x, route, weights)
            return x
        refuse_training(self.short, x=x)
        if torch.onnx.is_in_onnx_export():  # has no ops of ours, and drops such as return nothing
            return x.copy_(call_op(self.functional_op, x, *self.operands.of(route, weights)))
        self.in_place_op(x, *self.operands.of(route, weights))
        return x

    def _checked(self, x: Tensor, selection: Route | Tensor, weights: BlockWeights) -> Route:
        """The route of a selection; raises where it or x [B, C, H, W] does not fit the weights."""
        if not isinstance(x, Tensor):
            refuse_symbols(self.short, x)
        like, shape = weights.first, x.shape
        C = like.shape[1]
        if len(shape) != 4 or shape[1] != C or shape[2] == 0 or shape[3] == 0:
            raise ValueError(f"{self.short}: x must be [B, {C}, H, W] with H and W of at least 1, got {list(shape)}")
        if x.device != like.device:
            raise ValueError(f"{self.short}: x must be on {like.device} as the weights are, got {x.device}")
        if x.dtype != like.dtype:
            raise TypeError(f"{self.short}: x must be {like.dtype} as the weights are, got {x.dtype}")
        return route_for(x, selection, len(weights.groups), self.short)

    def _check_shortcut(self, x: Tensor, weights: BlockWeights, shortcut: Tensor) -> None:
        """Raise unless shortcut is [B, C_out, H_out, W_out], on the device and of the dtype of x [B, C, H, W]."""
        shape, got = out_shape(x, weights.out_channels, weights.stride), shortcut.shape
        if got != shape or shortcut.device != x.device:
            raise ValueError(
                f"{self.short}: shortcut must be {list(shape)} on {x.device}, got {list(got)} on {shortcut.device}"
            )
        if shortcut.dtype != x.dtype:
            raise TypeError(f"{self.short}: shortcut must be {x.dtype} as x is, got {shortcut.dtype}")


def empty_result(x: Tensor, weights: BlockWeights) -> Tensor:
    """Memory for the block's result, [B, C_out, ceil(H / stride), ceil(W / stride)] channels-last."""
    shape = out_shape(x, weights.out_channels, weights.stride)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
