"""The convolutions of a frozen model that no level reaches (stems, shortcuts, heads), on weights packed once."""

from functools import lru_cache
from typing import Self

import torch
from torch import Tensor, nn

from .. import _conv_direct
from .._geometry import Geometry
from ..eager import runs_eagerly
from ..plan import Route, RoutingPlan

_MOST_TAPS = 9  # oneDNN is as fast with more, as those of a 7 x 7 stem are


class FrozenConv2d(nn.Conv2d):
    """An `nn.Conv2d` whose weights lie packed for the direct convolution of a CPU, where that takes them.

    oneDNN packs channels-last weights in every call: of a ResNet-50's last shortcut, with one image, that is three
    quarters of its time. Traced, transformed or with gradients, and on other devices, it is `F.conv2d` on the weight.
    """

    packed: Tensor
    geometry: Geometry

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> Self:
        """One that shares the parameters of `conv`."""
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        own = cls(**{name: getattr(conv, name) for name in names}, bias=conv.bias is not None, device="meta")
        own.weight, own.bias = conv.weight, conv.bias
        own.geometry, own.packed = _geometry_of(conv), _conv_direct.pack(conv.weight.detach(), ())
        return own.eval()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C_out, H_out, W_out], channels-last in memory."""
        if not (runs_eagerly(x, self.weight) and self._takes(x)):
            return super().forward(x)
        route, shape = _route_of_all(x.shape[0]), self.geometry.out_shape(x, self.weight)
        return _conv_direct.forward(x, self.packed, self.kernel_size, self.bias, route, shape, self.geometry)

    def _takes(self, x: Tensor) -> bool:
        """True where the direct convolution computes x, and x fits: what does not, torch explains."""
        fits = x.ndim == 4 and x.shape[1] == self.in_channels and x.numel() > 0 and x.dtype == self.packed.dtype
        if not fits or torch.is_autocast_enabled(x.device.type):
            return False
        whole = min(self.geometry.out_shape(x, self.weight)) > 0
        return whole and _conv_direct.runs_direct(x, self.weight, self.geometry, packed=True)


def pack_convolutions(model: nn.Module) -> int:
    """Put a `FrozenConv2d` in the place of each plain convolution that it can run; the number of those.

    Those that have hooks, or stand in several places, stay as they are.
    """
    modules = list(model.named_modules(remove_duplicate=False))
    places = [id(module) for _, module in modules]
    made = 0
    for path, module in modules:
        if type(module) is nn.Conv2d and path and places.count(id(module)) == 1 and _is_packed_faster(module):
            model.set_submodule(path, FrozenConv2d.from_conv(module))
            made += 1
    return made


def _is_packed_faster(conv: nn.Conv2d) -> bool:
    weight = conv.weight
    zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    if not zeros or conv._forward_hooks or conv._forward_pre_hooks or weight[0, 0].numel() > _MOST_TAPS:
        return False
    x = torch.empty(1, conv.in_channels, 32, 32, dtype=weight.dtype, device=weight.device)
    return _conv_direct.runs_direct(x, weight, _geometry_of(conv), packed=True)


def _geometry_of(conv: nn.Conv2d) -> Geometry:
    assert not isinstance(conv.padding, str)
    return Geometry(conv.stride, conv.padding, conv.dilation, conv.groups, (), ())


@lru_cache(maxsize=64)
def _route_of_all(instances: int) -> Route:
    """The route of one channel group that all instances use."""
    return RoutingPlan.from_levels(torch.ones(instances, 1, dtype=torch.int32), 1)[0]
