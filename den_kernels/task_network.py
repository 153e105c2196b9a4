"""Networks of several tasks around layers that they share, at inference on a CPU in one call.

    logits = head_k(features(layers(stem_k(images))))        for the instances of each task k

A stem is a convolution with bias and ReLU. The shared layers are a trunk of elastic blocks (`dynamic_trunk`), or plain
convolutions with bias and ReLU and the mean of their map: an estimator and a selector (Ahn, Kim, Oh, ICCV 2019). For
one image the calls between small layers take longer than the layers; here they are one call of C++
(csrc/task_network.cpp), in which a chunk of instances is one thread's work from the images to the features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._extension import extension
from ._handle import HasHandle
from .dynamic_trunk import TrunkWeights
from .eager import in_range

_OP = "task_network"
_NAME = f"den_kernels::{_OP}"
MOST_TAPS = 49


@dataclass(frozen=True)
class DenseConv(HasHandle):
    """`relu(conv(x) + bias)` over all channels, and a max pooling behind that; weights packed for the kernel.

    sizes: C, C_out, R, S, stride, padding. weight: packed. bias: [C_out]. pool: its size, stride and padding, of size 0
    where there is none.
    """

    sizes: tuple[int, int, int, int, int, int]
    weight: Tensor
    bias: Tensor
    pool: tuple[int, int, int] = (0, 1, 0)

    @cached_property
    def handle(self) -> Any:
        """The kernel's own object, `extension.DenseConv`."""
        return extension.DenseConv(self.sizes, self.weight, self.bias, pool=self.pool)

    @classmethod
    def of(cls, conv: nn.Conv2d, weight: Tensor, bias: Tensor, pool: tuple[int, int, int] = (0, 1, 0)) -> "DenseConv":
        """Of weight [C_out, C, R, S] and bias [C_out] in place of those of `conv`, which `takes_conv` takes."""
        sizes = (*weight.shape[1::-1], *weight.shape[2:], conv.stride[0], int(conv.padding[0]))
        packed = weight.new_empty(extension.dense_packed_size(sizes, weight.dtype == torch.bfloat16))
        extension.pack_dense(sizes, weight.contiguous(memory_format=torch.channels_last), packed)
        return cls(sizes, packed, bias.contiguous(), pool)


def takes_conv(conv: nn.Conv2d) -> bool:
    """True where the kernel takes a convolution: one stride, one padding, no dilation, no groups, at most 49 taps."""
    square = conv.stride[0] == conv.stride[1] and not isinstance(conv.padding, str) and len({*conv.padding}) == 1
    plain = conv.groups == 1 and tuple(conv.dilation) == (1, 1) and conv.padding_mode == "zeros"
    return square and plain and conv.kernel_size[0] * conv.kernel_size[1] <= MOST_TAPS


def runs_here(dtype: torch.dtype) -> bool:
    """True where the kernel computes in `dtype` on this machine."""
    if extension is None:
        return False
    if dtype == torch.float32:
        return extension.has_direct_float32()
    return dtype == torch.bfloat16 and extension.has_direct_bf16()


@dataclass(frozen=True)
class DenseHead(HasHandle):
    """A fully connected layer `weight (x * scale + shift) + bias`.

    weight: [O, C]. bias: [O]. scale, shift: float32 [C], or both None.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None

    @cached_property
    def handle(self) -> Any:
        """The kernel's own object, `extension.Head`."""
        return extension.Head((self.weight, self.bias, self.scale, self.shift))


@dataclass(frozen=True)
class TaskNetwork(HasHandle):
    """Folded weights: a stem and a head for each task, and what they share: a trunk with a norm behind it, or plain
    convolutions.

    sizes: of each task the side that smaller images are enlarged to; none: images are taken as they are.
    """

    stems: tuple[DenseConv, ...]
    shared: TrunkWeights | tuple[DenseConv, ...]
    heads: tuple[DenseHead, ...]
    sizes: tuple[int, ...] = ()

    @cached_property
    def handle(self) -> Any:
        """The kernel's own object, `extension.TaskNetwork`; ValueError for layers that do not follow one another."""
        own = isinstance(self.shared, TrunkWeights)
        shared = self.shared.handle if own else [conv.handle for conv in self.shared]  # type: ignore[union-attr]
        return extension.TaskNetwork([s.handle for s in self.stems], shared, [h.handle for h in self.heads])

    def __call__(
        self,
        tasks: Sequence[int],
        images: Sequence[Tensor],  # [B_k, C, H, W] of each
        levels: Tensor | None = None,  # of a trunk: int32 [N, B] or int64 [B, N], in the order of the images
    ) -> list[Tensor]:  # [B_k, O] of each
        """Logits of the images of each task.

        Raises ValueError for images, tasks or levels that do not fit the weights, TypeError for another dtype.
        """
        return in_range(_NAME, self._run, tasks, images, levels)

    def _run(self, tasks: Sequence[int], images: Sequence[Tensor], levels: Tensor | None) -> list[Tensor]:
        widths = self._widths
        logits = [x.new_empty(x.shape[0], widths[k]) for k, x in zip(tasks, images, strict=True)]
        self.handle(self._parts(tasks, images), levels, logits, None)
        return logits

    def choose(self, tasks: Sequence[int], images: Sequence[Tensor], blocks: int) -> Tensor:
        """The largest of the L logits of each block, int64 [B, blocks], the heads having [blocks * L] outputs.

        Of equal ones the first, of any with NaN among them the first NaN. Arguments and errors as of a call.
        """
        return in_range(_NAME, self._choose, tasks, images, blocks)

    def _choose(self, tasks: Sequence[int], images: Sequence[Tensor], blocks: int) -> Tensor:
        chosen = torch.empty(sum([x.shape[0] for x in images]), blocks, dtype=torch.int64)
        self.handle(self._parts(tasks, images), None, None, chosen)
        return chosen

    @cached_property
    def _widths(self) -> list[int]:
        return [len(head.bias) for head in self.heads]

    def _parts(self, tasks: Sequence[int], images: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """The task and images of each part as the kernel reads them: enlarged, channels-last."""
        if self.sizes:
            pairs = zip(images, [self.sizes[k] for k in tasks], strict=True)
            images = [x if x.shape[-1] >= size else enlarge(x, size) for x, size in pairs]
        laid = [x.contiguous(memory_format=torch.channels_last) for x in images]
        return list(zip(tasks, laid, strict=True))


def enlarge(images: Tensor, size: int) -> Tensor:
    """Interpolate [B, C, S, S] to [B, C, size, size], bilinear, where they are smaller; an empty batch stays empty."""
    if images.shape[-1] >= size:
        return images
    if not images.shape[0]:
        return images.new_empty(0, images.shape[1], size, size)
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
