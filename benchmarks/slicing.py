"""Two more ways that people run a different width for every instance: one call each, and one grouped convolution."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .peers import ElasticConv, FoldedBlock, PreactBlock, channels_last, slice_block


class PerInstanceBlock:
    """One call for every image, with the weights of its channels sliced beforehand, as Once-for-All style code does."""

    def __init__(self, block: PreactBlock, selection: Tensor) -> None:  # selection: bool [B, M]
        sliced: dict[tuple[bool, ...], PreactBlock] = {}
        for row in selection.unique(dim=0):
            if row.any():
                sliced[tuple(row.tolist())] = slice_block(block, row.nonzero().flatten())
        self.block, self.parts = block, [sliced.get(tuple(row.tolist())) for row in selection]

    def __call__(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', H', W']
        images = zip(x.split(1), self.parts, strict=True)
        return torch.cat([self.block.shortcut(image) if part is None else part(image) for image, part in images])


class GroupedBlock:
    """The batch folded into the groups of one convolution, every instance with weights of its own, zero where unused.

    All instances compute as many hidden channels as the widest one; the stacked weights take batch times the memory.
    """

    def __init__(self, block: PreactBlock, selection: Tensor) -> None:  # selection: bool [B, M]
        self.block, batch = block, len(selection)
        used = selection[:, : max(1, int((selection * torch.arange(1, selection.shape[1] + 1)).max()))]
        mask, width = used.to(block.conv1.weight.dtype), used.shape[1]
        folded = FoldedBlock(block).conv1
        weights, biases = folded.weight.detach()[:width], folded.bias.detach()[:width]
        self.conv1 = (weights * mask[:, :, None, None, None]).flatten(0, 1)  # [B * width, C, R, S]
        self.bias1 = (biases * mask).flatten()
        conv2 = block.conv2.weight.detach()[:, :width]
        self.conv2 = (conv2 * mask[:, None, :, None, None]).flatten(0, 1)  # [B * C_out, width, R, S]
        self.batch = batch

    def __call__(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', H', W']
        a = self.block.activated(x)
        folded = a.reshape(1, -1, *a.shape[2:])
        stride, padding = self.block.conv1.stride, self.block.conv1.padding
        hidden = F.relu_(F.conv2d(folded, self.conv1, self.bias1, stride, padding, groups=self.batch))
        branch = F.conv2d(hidden, self.conv2, None, 1, self.block.conv2.padding, groups=self.batch)
        return branch.view(self.batch, -1, *branch.shape[2:]).add_(self.block.shortcut(x))


class PerInstanceConv:
    """One call for every image, for one convolution without bias."""

    def __init__(self, elastic: ElasticConv) -> None:
        self.channels = elastic.conv.out_channels
        self.parts: dict[int, tuple[Tensor | slice, Tensor | slice, Callable[[Tensor], Tensor]]] = {}
        for rows, outputs, inputs, conv in elastic.pieces():
            self.parts |= dict.fromkeys(rows.tolist(), (outputs, inputs, conv))

    def __call__(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', H', W']
        out = channels_last(x.new_zeros(len(x), self.channels, *x.shape[2:]))
        for i, (outputs, inputs, conv) in self.parts.items():
            out[i : i + 1, outputs] = conv(channels_last(x[i : i + 1, inputs]))
        return out


class GroupedConv:
    """The batch folded into the groups of one convolution without bias, weights zeroed where not selected."""

    def __init__(self, elastic: ElasticConv, batch: int) -> None:
        conv, weight = elastic.conv, elastic.conv.weight.detach()
        stacked = weight.expand(batch, *weight.shape)
        if elastic.out_selection is not None:
            stacked = stacked * elastic.out_selection[:, :, None, None, None].to(weight.dtype)
        if elastic.in_selection is not None:
            stacked = stacked * elastic.in_selection[:, None, :, None, None].to(weight.dtype)
        self.weight, self.batch, self.stride, self.padding = stacked.flatten(0, 1), batch, conv.stride, conv.padding

    def __call__(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', H', W']
        folded = x.reshape(1, -1, *x.shape[2:])
        out = F.conv2d(folded, self.weight, None, self.stride, self.padding, groups=self.batch)
        return out.view(self.batch, -1, *out.shape[2:])
