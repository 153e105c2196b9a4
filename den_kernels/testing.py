"""Helpers for tests and benchmarks of ops: tolerances that follow from the dtype, poisoned inputs, selections.

Nothing here needs a test framework: failures are AssertionErrors that name the worst element.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._extension import extension
from ._geometry import settle

LEVEL_KINDS = ("uniform", "zero", "top", "ascending", "no middle", "last only")


def error_units(
    got: Tensor,  # [...]
    exact: Tensor,  # [...] the same in float64
    scale: Tensor | None = None,  # [...] float64
) -> Tensor:  # [...] float64
    """The error of each element of `got`, in units of the size of the terms that were added up for it.

    scale: those sizes (of a convolution: the same convolution of the absolute values). Without it: the size of
    the result, at least its root mean square. An element of size 0 must be exact: its error there is infinite or 0.
    """
    got, exact = got.detach().double(), exact.detach().double()
    if scale is None:
        scale = exact.abs().clamp_min(float(exact.square().mean().sqrt()) if exact.numel() else 0.0)
    error = (got - exact).abs()
    return torch.where(error == 0, 0.0, error / scale)


def assert_as_accurate(
    got: Tensor,  # [...]
    peer: Tensor,  # [...] PyTorch's result for these arguments in the same dtype
    exact: Tensor,  # [...] PyTorch's result in float64
    scale: Tensor | None = None,  # [...] of `error_units`
    factor: float = 2.0,
) -> None:
    """Assert that no element of `got` errs more than `factor` times as much as PyTorch does in the same dtype.

    PyTorch's error is the largest of its `error_units`, at least one rounding of the dtype. Raises AssertionError.
    """
    assert got.shape == peer.shape == exact.shape, f"shapes differ: {got.shape}, {peer.shape}, {exact.shape}"
    assert got.dtype == peer.dtype, f"dtypes differ: {got.dtype}, {peer.dtype}"
    if got.numel() == 0:
        return
    units = error_units(got, exact, scale)
    allowed = factor * max(float(error_units(peer, exact, scale).max()), torch.finfo(got.dtype).eps / 2)
    worst = int(units.argmax())  # a NaN counts as the largest
    error = float(units.flatten()[worst])
    assert error <= allowed, (
        f"element {worst} of {list(got.shape)} errs by {error:.3g} units, "
        f"allowed are {allowed:.3g}: got {float(got.flatten()[worst])}, exact {float(exact.flatten()[worst])}"
    )


def channel_mask(
    selection: Tensor,  # bool [B, G] or integer levels [B]
    sizes: Sequence[int],  # [G]
) -> Tensor:  # bool [B, sum(sizes)]
    """The channels that each instance selected."""
    if selection.dtype != torch.bool:
        selection = selection[:, None] > torch.arange(len(sizes), device=selection.device)
    return selection.repeat_interleave(torch.tensor(sizes, device=selection.device), dim=1)


def poison_unread(x: Tensor, selection: Tensor, sizes: Sequence[int]) -> Tensor:
    """x [B, C, H, W] with NaN in the channels that the selection leaves unread, in x's memory format."""
    return torch.where(channel_mask(selection, sizes)[:, :, None, None], x, float("nan"))


def make_levels(kind: str, batch: int, groups: int, seed: int = 0) -> Tensor:  # int64 [B]
    """Levels of the named kind, of LEVEL_KINDS: all equal, already sorted, a level that nobody chose, one alone."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.randint(0, groups + 1, (batch,), generator=generator)
    made = {
        "uniform": uniform,
        "zero": torch.zeros_like(uniform),
        "top": torch.full_like(uniform, groups),
        "ascending": uniform.sort().values,
        "no middle": uniform.where((uniform == 0) | (uniform == groups), groups),
        "last only": torch.where(torch.arange(batch) == batch - 1, groups, 0),
    }
    return made[kind]


def make_mask(batch: int, groups: int, seed: int = 0, distinct: int = 4) -> Tensor:  # bool [B, G]
    """A mask with at most `distinct` different rows, holes included; the first is empty."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 2, (distinct, groups), generator=generator).bool()
    rows[0] = False
    return rows[torch.randint(0, distinct, (batch,), generator=generator)]


def masked_conv2d(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, R, S]
    bias: Tensor | None,  # [C_out]
    selection: Tensor,  # bool [B, G] or integer levels [B]
    *,
    out_groups: Sequence[int] | None = None,
    in_groups: Sequence[int] | None = None,
    **keywords: Any,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """A dynamic convolution by PyTorch: the whole one, masked on both sides. Its error sets the tolerance."""
    if in_groups:
        x = x.where(channel_mask(selection, in_groups)[:, :, None, None], 0)
    settings = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | keywords
    geometry, border = settle(weight.shape, **settings, out_sizes=(), in_sizes=())
    y = F.conv2d(F.pad(x, border) if border else x, weight, bias, *geometry[:4])
    return y.where(channel_mask(selection, out_groups)[:, :, None, None], 0) if out_groups else y


@dataclass(frozen=True)
class ConvCase:
    """A seeded case for `dynamic_conv2d`. Group sizes are () on a side that is not elastic."""

    batch: int = 5
    size: tuple[int, int] = (9, 7)
    kernel: tuple[int, int] = (3, 3)
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 1
    dilation: int | tuple[int, int] = 1
    cardinality: int = 1
    channels: tuple[int, int] = (8, 12)
    """Of a side that is not elastic: input, output."""
    in_sizes: tuple[int, ...] = ()
    out_sizes: tuple[int, ...] = (3, 5, 4)
    bias: bool = True
    selection: str = "uniform"
    """One of LEVEL_KINDS, or "mask"."""
    layout: str = "channels_last"
    """Of x: one of LAYOUTS."""
    weight_channels_last: bool = True
    seed: int = 0

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of `dynamic_conv2d`."""
        return {
            "stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.cardinality,
            "out_groups": self.out_sizes or None, "in_groups": self.in_sizes or None,
        }  # fmt: skip

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """x (NaN where the selection does not read it), weight, bias, selection; all values are exact in bfloat16."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).bfloat16().to(dtype)

        C_in = sum(self.in_sizes) or self.channels[0]
        C_out = sum(self.out_sizes) or self.channels[1]
        groups = len(self.out_sizes) or len(self.in_sizes)
        selection = (
            make_mask(self.batch, groups, self.seed)
            if self.selection == "mask"
            else make_levels(self.selection, self.batch, groups, self.seed)
        )
        x, weight = normal(self.batch, C_in, *self.size), normal(C_out, C_in // self.cardinality, *self.kernel)
        if self.in_sizes:
            x = poison_unread(x, selection, self.in_sizes)
        if self.weight_channels_last:
            weight = weight.contiguous(memory_format=torch.channels_last)
        return in_layout(x, self.layout), weight, normal(C_out) if self.bias else None, selection


LAYOUTS = ("contiguous", "channels_last", "contiguous slice", "channels_last slice", "transposed")


def in_layout(x: Tensor, layout: str) -> Tensor:
    """x [B, C, H, W] with the same values in the memory layout named, of LAYOUTS; slices are of a larger buffer."""
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    format = torch.channels_last if layout.startswith("channels_last") else torch.contiguous_format
    if not layout.endswith("slice"):
        return x.contiguous(memory_format=format)
    B, C, H, W = x.shape
    wide = torch.full((B + 1, C + 3, H, W), float("nan"), dtype=x.dtype, device=x.device).to(memory_format=format)
    return wide[1:, 2 : 2 + C].copy_(x)


@contextmanager
def float32_limited_to(isa: str) -> Iterator[None]:
    """Let a CPU's float32 kernels use at most this instruction set: "AVX-512", "AVX2" or "", none of them.

    For all threads of the process, at calls and where weights are prepared; the packed weights are the same for both
    sets. With "" calls go through oneDNN, and weights that are packed already raise RuntimeError. Needs the extension.
    """
    before = extension.float32_isa()
    extension.limit_float32_isa(isa)
    try:
        yield
    finally:
        extension.limit_float32_isa(before)
