"""A selector for a converted model of somebody else."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from den.nn.selector import Selector, SelectorConfig
from den.nn.tasks import Task
from den_kernels import ElasticModel, level_flops, report_of

SHARE = 0.04  # of the model's FLOPs that a default selector may take
NEVER = -1e4  # a logit of probability 0, that float16 holds and whose gradients are finite
_OP = "attach_selector"


class ImageSelector(nn.Module):
    """A selector of one task over the levels 0..G of N blocks: images [B, C, H, W] -> levels int64 [B, N].

    Images are scaled to the square that the selector reads, if they are not as large.
    """

    def __init__(self, channels: Sequence[int], image_channels: int, size: int, lowest: Sequence[int], levels: int):
        super().__init__()
        self.config, self.size, self.lowest = SelectorConfig(tuple(channels)), size, tuple(lowest)
        self.image_channels, self.levels = image_channels, levels
        task = Task("images", classes=1, size=size, channels=image_channels)
        self.selector = Selector([task], self.config, len(self.lowest), levels, size)
        allowed = torch.arange(levels) >= torch.tensor(self.lowest)[:, None]
        self._allowed: Tensor
        self.register_buffer("_allowed", allowed, persistent=False)

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, N, G + 1]; `NEVER` of levels below the lowest of a block."""
        if tuple(images.shape[-2:]) != (self.size, self.size):
            images = nn.functional.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return self.selector(images, 0).masked_fill(~self._allowed, NEVER)

    def forward(self, images: Tensor) -> Tensor:
        """The most probable levels, int64 [B, N]."""
        return self.logits(images).argmax(-1)

    def flops(self) -> int:
        """FLOPs for one image."""
        return self.selector.flops(0)


def attach_selector(model: nn.Module, images: Tensor, channels: Sequence[int] | None = None) -> ElasticModel:
    """A converted model with a selector of its levels, which is not trained yet: see `den.train_elastic`.

    Args:
        model: what `den_kernels.convert` made elastic; not copied.
        images: [B, C, H, W] as the model takes them, at least one.
        channels: of the selector's stride-2 convolutions; None: (C, 2C, 2C) with the largest C in steps of 8 that takes
            at most 4 % of the model's FLOPs, from 8 to 64.

    Returns:
        An `ElasticModel`: `elastic(images)` runs each image at the levels that `elastic.selector(images)` gives,
        `elastic.selector.logits(images)` are [B, N, G + 1].

    Raises:
        ValueError: a model that was not converted, images of another shape, channels below 1.
    """
    report = report_of(model)
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{_OP}: images must be [B, C, H, W] with at least one, got {got}")
    size = min(int(min(images.shape[-2:])), 64)
    if channels is None:
        budget = SHARE * level_flops(model, images[:1]).full
        fitting = [
            c for c in range(8, 65, 8) if SelectorConfig((c, 2 * c, 2 * c)).flops(images.shape[1], size) <= budget
        ]
        width = max(fitting, default=8)
        channels = (width, 2 * width, 2 * width)
    selector = ImageSelector(channels, images.shape[1], size, report.lowest, report.groups + 1)
    first = next(model.parameters())
    return ElasticModel(model, selector.to(first.device, first.dtype))
