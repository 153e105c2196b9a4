"""Alternatives to our kernels in plain PyTorch, and the loops over selections that serve as oracles.

Nothing here imports den_kernels. All tensors are channels-last, all networks in eval mode. ``selection`` is bool
[B, M]: the (hidden or output) channels that each instance uses.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Convolution = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Segment:
    """Instances that use the same channels."""

    rows: Tensor  # int64 [n]
    channels: Tensor  # int64 [w]


def segments(selection: Tensor) -> list[Segment]:
    """The distinct rows of ``selection`` (bool [B, M]) that use any channel, with their instances."""
    patterns, members = selection.unique(dim=0, return_inverse=True)
    pairs = [(members == i).nonzero().flatten() for i in range(len(patterns))]
    found = [Segment(rows, pattern.nonzero().flatten()) for rows, pattern in zip(pairs, patterns, strict=True)]
    return [segment for segment in found if segment.channels.numel()]


def select_channels(groups: Tensor, sizes: Sequence[int]) -> Tensor:
    """bool [B, G] over groups -> bool [B, M] over channels.

    >>> select_channels(torch.tensor([[True, False]]), (1, 2))
    tensor([[ True, False, False]])
    """
    return groups.repeat_interleave(torch.tensor(sizes, device=groups.device), dim=1)


def select_levels(levels: Tensor, sizes: Sequence[int]) -> Tensor:
    """levels [B] -> bool [B, M]: the channels of the first ``levels[b]`` groups."""
    return select_channels(torch.arange(len(sizes), device=levels.device) < levels[:, None], sizes)


def rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]`` for a channels-last ``x`` [B, C, H, W], copied through the flat view (indexing goes to NCHW)."""
    _, c, h, w = x.shape
    return flat(x).index_select(0, rows).view(-1, h, w, c).permute(0, 3, 1, 2)


def flat(x: Tensor) -> Tensor:
    """A channels-last ``x`` [B, C, H, W] as [B, H·W·C], without a copy."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1)


def channels_last(x: Tensor) -> Tensor:
    """``x`` [B, C, H, W], contiguous in channels-last order."""
    return x.contiguous(memory_format=torch.channels_last)


class PreactBlock(nn.Module):
    """The dense residual block as anybody writes it: x + conv2(relu(bn2(conv1(relu(bn1(x)))))); bn1 may be None.

    The shortcut is 2x2 average pooling where conv1 has stride 2, and zeros for the channels that are new.
    """

    def __init__(self, conv1: nn.Conv2d, bn1: nn.BatchNorm2d | None, conv2: nn.Conv2d, bn2: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv1, bn1, conv2, bn2

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', H', W']
        return self.hidden_to_output(self.hidden(self.activated(x))).add_(self.shortcut(x))

    def activated(self, x: Tensor) -> Tensor:
        """relu(bn1(x)) of x [B, C, H, W], or x without a bn1."""
        return x if self.bn1 is None else F.relu_(self.bn1(x))

    def hidden(self, x: Tensor) -> Tensor:
        """relu(bn2(conv1(x))): x [B, C, H, W] -> [B, M, H', W']."""
        return F.relu_(self.bn2(self.conv1(x)))

    def hidden_to_output(self, h: Tensor) -> Tensor:
        """conv2(h): h [B, M, H', W'] -> [B, C', H', W']."""
        return self.conv2(h)

    def shortcut(self, x: Tensor) -> Tensor:
        """x [B, C, H, W], pooled and padded to the shape [B, C', H', W'] of the block's output."""
        if self.conv1.stride == (2, 2):
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        extra = self.conv2.out_channels - x.shape[1]
        return F.pad(x, (0, 0, 0, 0, 0, extra)) if extra else x


def randomise_norms(module: nn.Module) -> None:
    """Draw the weights and statistics of all batch norms in a module, from the global generator."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
            norm.running_mean.normal_(std=0.2)
            norm.running_var.uniform_(0.5, 1.5)


class FoldedBlock(PreactBlock):
    """`PreactBlock` with bn2 folded into conv1's weight and bias."""

    def __init__(self, block: PreactBlock) -> None:
        super().__init__(*(copy.deepcopy(m) for m in (block.conv1, block.bn1, block.conv2, block.bn2)))
        self.eval()
        self.conv1 = nn.utils.fuse_conv_bn_eval(self.conv1, self.bn2)
        self.conv1.weight = nn.Parameter(channels_last(self.conv1.weight.detach()))
        self.bn2 = nn.Identity()


class PackedBlock(FoldedBlock):
    """FoldedBlock with oneDNN's own weight layout and ReLU inside conv1: what compilation with frozen weights gives."""

    def __init__(self, block: PreactBlock, input_size: Sequence[int]) -> None:
        super().__init__(block)
        b, _, h, w = input_size
        stride = self.conv1.stride[0]
        hidden_size = (b, self.conv1.out_channels, -(-h // stride), -(-w // stride))
        self._packed1 = packed_convolution(self.conv1, tuple(input_size), "relu")
        self._packed2 = packed_convolution(self.conv2, hidden_size, "none")

    def hidden(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, M, H', W']
        return self._packed1(x)

    def hidden_to_output(self, h: Tensor) -> Tensor:  # [B, M, H', W'] -> [B, C', H', W']
        return self._packed2(h)


def packed_convolution(conv: nn.Conv2d, input_size: Sequence[int], activation: str) -> Convolution:
    """``conv`` through oneDNN with prepacked weights; ``activation`` is "none" or "relu"."""
    padding, stride, dilation = list(conv.padding), list(conv.stride), list(conv.dilation)
    weight = torch.ops.mkldnn._reorder_convolution_weight(
        conv.weight.detach(), padding, stride, dilation, conv.groups, list(input_size)
    )
    bias = None if conv.bias is None else conv.bias.detach()
    call = torch.ops.mkldnn._convolution_pointwise.default
    return lambda x: call(x, weight, bias, padding, stride, dilation, conv.groups, activation, [], None)


def can_pack(x: Tensor) -> bool:
    """True where this torch and CPU have oneDNN's prepacked convolutions, for maps like ``x`` [B, C, H, W]."""
    if not (x.is_cpu and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return False
    return x.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class MaskedBlock:
    """Block as dynamic networks usually run it: compute every channel, multiply the hidden map by a mask."""

    def __init__(self, block: PreactBlock, selection: Tensor) -> None:  # selection: bool [B, M]
        self.block, self.mask = block, selection[:, :, None, None].to(block.conv1.weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', H', W']
        hidden = self.block.hidden(self.block.activated(x)).mul_(self.mask)
        return self.block.hidden_to_output(hidden).add_(self.block.shortcut(x))


def slice_block(block: PreactBlock, channels: Tensor) -> PreactBlock:
    """The block with only the hidden ``channels`` (int64 [m]), weights copied."""
    conv1, bn2, conv2 = (copy.deepcopy(m) for m in (block.conv1, block.bn2, block.conv2))
    conv1.weight = nn.Parameter(channels_last(conv1.weight.detach()[channels]))
    conv2.weight = nn.Parameter(channels_last(conv2.weight.detach()[:, channels]))
    conv1.out_channels = bn2.num_features = conv2.in_channels = len(channels)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(bn2, name).data = getattr(bn2, name).data[channels].clone()
    return PreactBlock(conv1, block.bn1, conv2, bn2)


class BucketBlock:
    """Bucket by level in plain PyTorch: gather the rows of a segment, run its sliced block, add the result back.

    Doubles as the oracle, in float64.
    """

    def __init__(self, block: PreactBlock, selection: Tensor) -> None:  # selection: bool [B, M]
        self.block = block
        self.parts = [(segment.rows, slice_block(block, segment.channels)) for segment in segments(selection)]

    def __call__(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', H', W']
        shortcut = self.block.shortcut(x)
        out = channels_last(shortcut.clone() if shortcut is x else shortcut)
        for rows, part in self.parts:
            branch = part.conv2(part.hidden(part.activated(rows_of(x, rows))))
            flat(out).index_add_(0, rows, flat(channels_last(branch)))
        return out


class BareBlock:
    """Only the convolutions of the levels, on rows gathered beforehand: no batch norm, no ReLU, no data movement.

    x: [B, C, H, W]; selection: bool [B, M]; packed: through oneDNN with prepacked weights.
    """

    def __init__(self, block: PreactBlock, x: Tensor, selection: Tensor, packed: bool) -> None:  # [B, C, H, W], [B, M]
        self.parts: list[tuple[Tensor, Convolution, Convolution]] = []
        for segment in segments(selection):
            part, rows = slice_block(block, segment.channels), channels_last(rows_of(x, segment.rows))
            convolutions: tuple[Convolution, Convolution] = (part.conv1, part.conv2)
            if packed:
                hidden_size = (len(rows), part.conv2.in_channels, *rows.shape[2:])
                convolutions = (
                    packed_convolution(part.conv1, rows.shape, "none"),
                    packed_convolution(part.conv2, hidden_size, "none"),
                )
            self.parts.append((rows, *convolutions))

    def __call__(self) -> list[Tensor]:
        return [second(first(rows)) for rows, first, second in self.parts]


class DenseNetwork(nn.Module):
    """A stem, blocks in order, and the closing norm, average pool and head: images [B, c, S, S] -> logits [B, classes].

    Each of ``blocks`` maps [B, C, H, W] -> [B, C', H', W'].
    """

    def __init__(self, stem: nn.Module, blocks: Sequence[Callable[[Tensor], Tensor]], norm: nn.Module, head: nn.Module):
        super().__init__()
        self.stem, self.blocks, self.norm, self.head = stem, list(blocks), norm, head
        self.modules_of_blocks = nn.ModuleList(block for block in blocks if isinstance(block, nn.Module))

    def forward(self, images: Tensor, samples: int = 1) -> Tensor:
        """Logits [B * samples, classes] of images [B, c, S, S], each repeated ``samples`` times after the stem."""
        x = self.stem(images)
        if samples > 1:
            x = channels_last(x.repeat_interleave(samples, 0))
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu_(self.norm(x)).mean((2, 3)))

    def with_blocks(self, blocks: Sequence[Callable[[Tensor], Tensor]]) -> DenseNetwork:
        """This network around other blocks, each [B, C, H, W] -> [B, C', H', W']."""
        return DenseNetwork(self.stem, blocks, self.norm, self.head)

    def block_input_sizes(self, images: Tensor) -> list[torch.Size]:
        """The shape of every block's input for a batch like ``images``."""
        sizes, x = [], self.stem(images)
        for block in self.blocks:
            sizes.append(x.shape)
            x = block(x)
        return sizes


def plain_conv(conv: nn.Conv2d) -> nn.Conv2d:
    """A copy of a convolution (of any subclass) as a plain nn.Conv2d."""
    channels, geometry = (conv.in_channels, conv.out_channels), (conv.stride, conv.padding, conv.dilation)
    plain = nn.Conv2d(*channels, conv.kernel_size, *geometry, conv.groups, conv.bias is not None)
    plain.to(dtype=conv.weight.dtype).load_state_dict(conv.state_dict())
    return plain.to(memory_format=torch.channels_last)


def plain_norm(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """A copy of a batch norm (of any subclass) as a plain nn.BatchNorm2d."""
    plain = nn.BatchNorm2d(norm.num_features, norm.eps).to(norm.weight.dtype)
    plain.load_state_dict(norm.state_dict())
    return plain


@dataclass(frozen=True)
class ElasticConv:
    """A convolution whose output and / or input channels each instance selects; None where the side is not elastic."""

    conv: nn.Conv2d
    out_selection: Tensor | None  # bool [B, C_out]
    in_selection: Tensor | None  # bool [B, C_in]

    def pieces(self) -> list[tuple[Tensor, Tensor | slice, Tensor | slice, nn.Conv2d]]:
        """(rows, output channels, input channels, sliced convolution) for each distinct selection that uses any."""
        selection = self.out_selection if self.out_selection is not None else self.in_selection
        assert selection is not None
        return [self._piece(segment) for segment in segments(selection)]

    def _piece(self, segment: Segment) -> tuple[Tensor, Tensor | slice, Tensor | slice, nn.Conv2d]:
        every = slice(None)
        outputs = as_slice(segment.channels) if self.out_selection is not None else every
        inputs = every
        if self.in_selection is not None:
            inputs = as_slice(self.in_selection[segment.rows[0]].nonzero().flatten())
        part = copy.deepcopy(self.conv)
        part.weight = nn.Parameter(channels_last(part.weight.detach()[outputs][:, inputs]))
        part.out_channels, part.in_channels = part.weight.shape[:2]
        return segment.rows, outputs, inputs, part


def as_slice(channels: Tensor) -> Tensor | slice:
    """Channels int64 [m], ascending: a slice (a view when indexed) where they are consecutive, else as they are."""
    first, last = int(channels[0]), int(channels[-1])
    return slice(first, last + 1) if last - first + 1 == len(channels) else channels


class BucketConv:
    """Bucket by level, for one convolution without bias. Doubles as the oracle, in float64."""

    def __init__(self, elastic: ElasticConv) -> None:
        self.elastic, self.parts = elastic, elastic.pieces()

    def __call__(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', H', W']
        h, w = (-(-side // step) for side, step in zip(x.shape[2:], self.elastic.conv.stride, strict=True))
        out = x.new_zeros(len(x), h, w, self.elastic.conv.out_channels)
        for rows, outputs, inputs, conv in self.parts:
            gathered = channels_last(rows_of(x, rows)[:, inputs])
            result = conv(gathered).permute(0, 2, 3, 1)
            if isinstance(outputs, slice):
                out[..., outputs].index_copy_(0, rows, result)
            else:
                whole = result.new_zeros(*result.shape[:3], out.shape[3])
                whole[..., outputs] = result
                out.index_copy_(0, rows, whole)
        return out.permute(0, 3, 1, 2)


class BareConv:
    """Only the convolutions, on inputs gathered beforehand from x [B, C, H, W]; packed: with oneDNN's own weights."""

    def __init__(self, elastic: ElasticConv, x: Tensor, packed: bool) -> None:  # [B, C, H, W]
        self.parts: list[tuple[Tensor, Convolution]] = []
        for rows, _, inputs, conv in elastic.pieces():
            gathered = channels_last(rows_of(x, rows)[:, inputs])
            self.parts.append((gathered, packed_convolution(conv, gathered.shape, "none") if packed else conv))

    def __call__(self) -> list[Tensor]:
        return [conv(gathered) for gathered, conv in self.parts]


def compiled(module: nn.Module, example: Tensor, autotune: bool = False) -> Callable[[Tensor], Tensor] | None:
    """``module`` through torch.compile with frozen weights, run once on ``example``; None and a warning if it fails.

    example: the module's input, a map [B, C, H, W] or images [B, c, S, S].
    autotune: search for the fastest kernels, which takes long. On a GPU the clock records the graph.
    """
    try:
        function = torch.compile(module, options={"freezing": True, "max_autotune": autotune})
        with torch.inference_mode():
            function(example)
    except RuntimeError as error:
        warnings.warn(f"torch.compile left out: {str(error).splitlines()[0]}", stacklevel=2)
        return None
    return function
