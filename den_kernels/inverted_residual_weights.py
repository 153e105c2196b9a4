"""An inverted residual block's parameters, folded and packed for :func:`den_kernels.dynamic_inverted_residual`."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._conv_direct import pack
from ._extension import extension
from ._fold_checks import check_convolution, check_layers, check_norm, hidden_groups
from ._handle import HasHandle
from .activations import check_activation, number_of
from .folding import fold_norm
from .residual_weights import stand_in

_OP = "dynamic_inverted_residual"
_WIDENED = (torch.bfloat16, torch.float16)
_WEIGHTS = ("conv1", "conv2", "conv3", "squeeze", "excite")


@dataclass(frozen=True)
class InvertedResidualWeights(HasHandle):
    """An inverted residual's parameters, folded for inference: made by :meth:`fold`, read by the op."""

    conv1: Tensor | None  # [M, C, 1, 1] with the scale of the norm behind it; None: conv2 reads x
    bias1: Tensor | None  # float32 [M], with that norm's shift
    conv2: Tensor | None  # [M, 1, R, S] likewise; None: conv3 reads what conv1 gives
    bias2: Tensor | None  # float32 [M]
    conv3: Tensor  # [C_out, M, 1, 1] likewise
    bias3: Tensor | None  # float32 [C_out]
    squeeze: Tensor | None  # [Q, M, 1, 1]; None of a block without gates
    squeeze_bias: Tensor | None  # float32 [Q]
    excite: Tensor | None  # [M, Q, 1, 1]
    excite_bias: Tensor | None  # float32 [M]
    groups: tuple[int, ...]  # sizes of the hidden channel groups, adding up to M
    stride: int  # of conv2
    activation: str  # behind conv1 and conv2
    squeeze_activation: str
    gate_activation: str
    skip: bool  # x is added
    direct: tuple[Tensor, ...] | None = (
        None  # the weights that there are, in float32, packed for the whole block's kernel
    )

    @staticmethod
    def fold(
        conv1: nn.Conv2d | None,
        bn1: nn.BatchNorm2d | None,
        conv2: nn.Conv2d | None,
        bn2: nn.BatchNorm2d | None,
        conv3: nn.Conv2d,
        bn3: nn.BatchNorm2d | None,
        squeeze: nn.Conv2d | None = None,
        excite: nn.Conv2d | None = None,
        *,
        activation: str = "relu6",
        squeeze_activation: str = "relu",
        gate_activation: str = "sigmoid",
        skip: bool = True,
    ) -> "InvertedResidualWeights":
        """Fold running statistics and affine parameters into the convolutions before them; a norm may be None.

        conv1: 1 x 1, C to M channels; its `out_groups` (of a `DynamicConv2d`) are the hidden channel groups, one group
        for an ordinary `nn.Conv2d`; None of a block that does not expand, whose groups are conv2's. conv2: depthwise, M
        channels, odd kernel of at most 49 taps, "same" padding, any stride; None: a pair of 1 x 1 convolutions. conv3:
        1 x 1, M to C_out channels. squeeze and excite: both None, or 1 x 1 from M to Q and from Q to M channels, which
        gate conv2's channels by their means. Activations are names of `den_kernels.activations.ACTIVATIONS`. skip: the
        block's input is added, which has the shape of its result.

        Raises TypeError for layers of another kind or of different dtypes, ValueError for convolutions that do not fit
        one another and for norms without running statistics.
        """
        given = {"conv1": conv1, "conv2": conv2, "conv3": conv3, "squeeze": squeeze, "excite": excite}
        convs = {name: conv for name, conv in given.items() if conv is not None}
        _check_convs(convs, skip)
        norms = {"conv1": bn1, "conv2": bn2, "conv3": bn3}
        check_layers(_OP, bn1=bn1, bn2=bn2, bn3=bn3)
        for name, norm in norms.items():
            if norm is not None and name in convs:
                check_norm(_OP, f"bn{name[-1]}", norm, convs[name].out_channels, conv3.weight)
        for name, each in (("activation", activation), ("squeeze_activation", squeeze_activation),
                           ("gate_activation", gate_activation)):  # fmt: skip
            check_activation(_OP, name, each)
        with torch.no_grad():
            folded: dict[str, Any] = {}
            for name in _WEIGHTS:
                pair = _folded(name, convs.get(name), norms.get(name), name != "conv3")
                folded[name], folded[_bias_of(name)] = pair
        first = convs.get("conv1") or convs["conv2"]
        stride = 1 if conv2 is None else conv2.stride[0]
        weights = InvertedResidualWeights(
            **folded, groups=hidden_groups(_OP, first), stride=stride, activation=activation,
            squeeze_activation=squeeze_activation, gate_activation=gate_activation, skip=skip,
        )  # fmt: skip
        return weights._with_direct() if weights._runs_direct() else weights

    @property
    def out_channels(self) -> int:
        """C_out: the channels of the result."""
        return self.conv3.shape[0]

    @property
    def first(self) -> Tensor:
        """A weight [_, C, 1, 1], of the dtype and on the device of the maps."""
        return self.conv3 if self.conv1 is None else self.conv1

    @property
    def relu(self) -> bool:
        """False: there is no ReLU of the sum."""
        return False

    @property
    def kernel(self) -> tuple[int, int]:
        """R, S of conv2; 1, 1 where there is none."""
        return (1, 1) if self.conv2 is None else tuple(self.conv2.shape[2:])  # type: ignore[return-value]

    @cached_property
    def handle(self) -> Any:
        """The kernel's own object for these weights, `extension.InvertedResidualBlock`; of weights with `direct`.

        Raises ValueError or TypeError for tensors that do not fit each other.
        """
        assert self.direct is not None
        packed = iter(self.direct)
        tensors = []
        for name in _WEIGHTS:
            tensors += [None if getattr(self, name) is None else next(packed), getattr(self, _bias_of(name))]
        Q = 0 if self.squeeze is None else self.squeeze.shape[0]
        shape = self.first.shape[1], sum(self.groups), self.out_channels, *self.kernel, self.stride, Q
        numbers = [number_of(each) for each in (self.activation, self.squeeze_activation, self.gate_activation)]
        block = extension.InvertedResidualBlock(shape, self.groups, tuple(tensors), numbers)
        return block if self.first.dtype == torch.float32 else _InFloat32(block)

    def released(self) -> "InvertedResidualWeights":
        """A copy without the weights themselves where a direct kernel runs, which reads packed ones; else self.

        What is left of them is their shape, dtype and device: one element, repeated.
        """
        if self.direct is None:
            return self
        held = {name: getattr(self, name) for name in _WEIGHTS}
        small: dict[str, Any] = {name: None if each is None else stand_in(each) for name, each in held.items()}
        return replace(self, **small)

    def _with_direct(self) -> "InvertedResidualWeights":
        packed = []
        for name in _WEIGHTS:
            if (weight := getattr(self, name)) is not None:
                packed.append(_pack_depthwise(weight.float()) if name == "conv2" else pack(weight.float(), ()))
        made = replace(self, direct=tuple(packed))
        _ = made.handle  # checked here, not in the first call
        return made

    def _runs_direct(self) -> bool:
        """True where the kernel of the whole block runs: a function of dtype and device, and of whether there is conv2.

        16-bit maps are widened around it. 1 x 1 convolutions alone are faster in bfloat16.
        """
        like = self.conv3
        takes = like.dtype == torch.float32 or (like.dtype in _WIDENED and self.conv2 is not None)
        return extension is not None and like.is_cpu and takes and extension.has_direct_float32()


class _InFloat32:
    """A block of the extension on maps of 16 bits: hidden maps and sums are float32."""

    def __init__(self, block: Any) -> None:
        self.block = block

    def __call__(self, x: Tensor, shortcut: Tensor | None, out: Tensor, route: tuple) -> None:
        """out = shortcut + branch(x), as `extension.InvertedResidualBlock` has it."""
        wide = None if shortcut is None else shortcut.float()
        result = torch.empty_like(out, dtype=torch.float32) if wide is None else wide
        self.block(x.float(), wide, result, route)
        out.copy_(result)


def _bias_of(name: str) -> str:
    """The field that holds the bias of a convolution."""
    return f"bias{name[-1]}" if name.startswith("conv") else f"{name}_bias"


def _folded(name: str, conv: nn.Conv2d | None, norm: nn.BatchNorm2d | None, filled: bool) -> list[Tensor | None]:
    """Weight and bias, at least float32, of a convolution and the norm behind it; `filled`: no bias is zeros."""
    if conv is None:
        return [None, None]
    if norm is not None:
        return list(fold_norm(conv.weight, conv.bias, norm, f"{_OP}: bn{name[-1]}"))
    weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
    wide = torch.promote_types(weight.dtype, torch.float32)
    if conv.bias is not None:
        return [weight, conv.bias.detach().to(wide)]
    return [weight, weight.new_zeros(conv.out_channels, dtype=wide) if filled else None]


def _pack_depthwise(weight: Tensor) -> Tensor:  # [M, 1, R, S] -> [ceil(M / 16), R * S, 16]
    M = weight.shape[0]
    rows = F.pad(weight.reshape(M, -1), (0, 0, 0, -M % 16))
    return rows.view(-1, 16, rows.shape[1]).transpose(1, 2).contiguous()


def _check_convs(convs: dict[str, nn.Conv2d], skip: bool) -> None:
    """Raise for convolutions that are none of a block's or do not fit one another."""
    for name, conv in convs.items():
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"{_OP}: {name} must be an nn.Conv2d, got {type(conv).__name__}")
    if "conv3" not in convs or not ("conv1" in convs or "conv2" in convs):
        raise ValueError(f"{_OP}: conv3 and one of conv1 and conv2 must be given, got {', '.join(convs) or 'none'}")
    conv3 = convs["conv3"]
    for name, conv in convs.items():
        depthwise = name == "conv2"
        if depthwise and not conv.groups == conv.in_channels == conv.out_channels:
            raise ValueError(f"{_OP}: conv2 must be depthwise, with as many channels in as out, got {conv}")
        check_convolution(_OP, name, conv, conv3, None if depthwise else 1, conv.groups if depthwise else 1)
        if depthwise and conv.kernel_size[0] * conv.kernel_size[1] > 49:
            raise ValueError(f"{_OP}: conv2 must have a kernel of at most 49 taps, got {conv.kernel_size}")
        if not depthwise and conv.kernel_size != (1, 1):
            raise ValueError(f"{_OP}: {name} must have a kernel of 1 x 1, got {conv.kernel_size}")
    if ("squeeze" in convs) != ("excite" in convs) or ("squeeze" in convs and "conv2" not in convs):
        given = ", ".join(convs)
        raise ValueError(f"{_OP}: squeeze and excite must be both given, with conv2, or both None, got {given}")
    _check_channels(convs, skip)


def _check_channels(convs: dict[str, nn.Conv2d], skip: bool) -> None:
    """Raise ValueError for convolutions whose channels, or the shape of whose result, do not fit."""
    order = [convs[name] for name in ("conv1", "conv2", "conv3") if name in convs]
    gates = [convs[name] for name in ("conv2", "squeeze", "excite", "conv3") if name in convs and "squeeze" in convs]
    for before, behind in (*pairwise(order), *pairwise(gates)):
        if before.out_channels != behind.in_channels:
            raise ValueError(
                f"{_OP}: each convolution must take the {before.out_channels} channels that the one before gives, got "
                f"{behind.in_channels}"
            )
    strided = "conv2" in convs and convs["conv2"].stride[0] > 1
    if skip and (order[0].in_channels != order[-1].out_channels or strided):
        raise ValueError(
            f"{_OP}: skip must be False of a block whose result has another shape than x, got True with "
            f"{order[0].in_channels} to {order[-1].out_channels} channels" + (" and a stride" if strided else "")
        )
