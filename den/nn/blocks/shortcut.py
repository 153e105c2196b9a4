"""The parameter-free shortcut of residual blocks."""

import torch.nn.functional as F
from torch import Tensor, nn


class Shortcut(nn.Module):
    """A residual block without its convolutions: 2x2 average pooling where `stride` is 2, zeros for new channels.

    [B, in_channels, H, W] -> [B, channels, ceil(H / stride), ceil(W / stride)]; an odd map's last row and column are
    pooled from what there is.

    Raises:
        ValueError: another stride, or fewer channels out than in.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, block: str) -> None:
        super().__init__()
        if stride not in (1, 2) or channels < in_channels:
            raise ValueError(
                f"{block}: stride must be 1 or 2 and channels at least in_channels,"
                f" got stride {stride}, channels {channels}, in_channels {in_channels}"
            )
        self.stride, self.new_channels = stride, channels - in_channels

    @property
    def is_identity(self) -> bool:
        """True where the shortcut is the identity: without its convolutions the block does nothing."""
        return self.stride == 1 and not self.new_channels

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels)) if self.new_channels else x
