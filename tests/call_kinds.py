"""Each op as a module of (x [4, 16, 6, 6], levels [4] in 0..4), for tests of what may be done with a call."""

import torch
from torch import Tensor, nn

from den.nn.blocks import BottleneckShape, ElasticBlock
from den_kernels import (
    BottleneckWeights,
    DynamicBatchNorm2d,
    DynamicConv2d,
    GraphWeights,
    InvertedResidualWeights,
    ResidualWeights,
    RoutingPlan,
    dynamic_bottleneck,
    dynamic_bottleneck_,
    dynamic_graph,
    dynamic_inverted_residual,
    dynamic_inverted_residual_,
    dynamic_residual,
    dynamic_residual_,
)

GROUPS = 4
LEVELS = torch.tensor([1, 0, 3, 4])
OTHER_LEVELS = torch.tensor([4, 2, 0, 1])
SAME = {"kernel_size": 3, "padding": 1}


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 16, 6, 6, generator=torch.Generator().manual_seed(seed))


class Routed(nn.Module):
    """A block that takes routes, given levels."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, levels: Tensor) -> Tensor:
        return self.block(x, RoutingPlan.from_levels(levels[:, None], GROUPS)[0])


class Masked(nn.Module):
    """A module whose selection is a mask, no prefix of the groups."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, levels: Tensor) -> Tensor:
        return self.module(x, (levels[:, None] + torch.arange(GROUPS)) % 3 == 1)


class Planned(nn.Module):
    """The numbers of a plan."""

    def __init__(self, masks: bool) -> None:
        super().__init__()
        self.masks = masks

    def forward(self, x: Tensor, levels: Tensor) -> Tensor:
        chosen = levels[:, None]
        if self.masks:
            plan = RoutingPlan.from_masks((chosen[..., None] + torch.arange(GROUPS)) % 3 == 1)
        else:
            plan = RoutingPlan.from_levels(chosen, GROUPS)
        return torch.cat([plan.levels.flatten(), plan.order.flatten(), plan.offsets.flatten()])


class Residual(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        conv1, conv2 = DynamicConv2d(16, 16, **SAME, out_groups=GROUPS), nn.Conv2d(16, 16, **SAME)
        self.weights = ResidualWeights.fold(conv1, nn.BatchNorm2d(16), conv2, nn.BatchNorm2d(16))
        self.inplace = inplace

    def forward(self, x: Tensor, levels: Tensor) -> Tensor:
        if self.inplace:
            return dynamic_residual_(x.clone(), levels, self.weights)
        return dynamic_residual(x, levels, self.weights)


class Bottleneck(nn.Module):
    """Of hidden channels that the kernel of the whole block takes (width 32), or that it does not."""

    def __init__(self, width: int = 32, inplace: bool = False) -> None:
        super().__init__()
        conv1 = DynamicConv2d(16, width, 1, bias=False, out_groups=GROUPS)
        conv2, conv3 = nn.Conv2d(width, width, **SAME), nn.Conv2d(width, 16, 1, bias=False)
        norms = nn.BatchNorm2d(16), nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.weights = BottleneckWeights.fold(conv1, norms[0], conv2, norms[1], conv3, norms[2])
        self.inplace = inplace

    def forward(self, x: Tensor, levels: Tensor) -> Tensor:
        if self.inplace:
            return dynamic_bottleneck_(x.clone(), levels, self.weights)
        return dynamic_bottleneck(x, levels, self.weights)


class Inverted(nn.Module):
    """A 3 x 3 depthwise convolution of 32 channels with gates."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        conv1, conv3 = DynamicConv2d(16, 32, 1, bias=False, out_groups=GROUPS), nn.Conv2d(32, 16, 1, bias=False)
        conv2, norms = nn.Conv2d(32, 32, **SAME, groups=32), [nn.BatchNorm2d(C) for C in (32, 32, 16)]
        gates = nn.Conv2d(32, 4, 1), nn.Conv2d(4, 32, 1)
        self.weights = InvertedResidualWeights.fold(conv1, norms[0], conv2, norms[1], conv3, norms[2], *gates)
        self.inplace = inplace

    def forward(self, x: Tensor, levels: Tensor) -> Tensor:
        if self.inplace:
            return dynamic_inverted_residual_(x.clone(), levels, self.weights)
        return dynamic_inverted_residual(x, levels, self.weights)


class Graph(nn.Module):
    """Three states; an instance keeps as many edges as its level says."""

    def __init__(self) -> None:
        super().__init__()
        edges = ((0, 1), (0, 2), (1, 2))
        self.graph = GraphWeights.pack(
            3, edges, [torch.randn(16, 16, 3, 3) for _ in edges], [torch.randn(16) for _ in edges]
        )

    def forward(self, x: Tensor, levels: Tensor) -> Tensor:
        plan = RoutingPlan.from_levels((levels[:, None] > torch.arange(3)).long(), 1)
        ones = x.new_ones(x.shape[0], 3)
        return dynamic_graph(x, self.graph, plan, ones, ones, ones)


def frozen(block: nn.Module) -> nn.Module:
    with torch.no_grad():
        block.eval().freeze()
    return Routed(block)


MODULES = {
    "conv": lambda: DynamicConv2d(16, 16, **SAME, out_groups=GROUPS),
    "conv in": lambda: DynamicConv2d(16, 16, **SAME, in_groups=GROUPS),
    "conv mask": lambda: Masked(DynamicConv2d(16, 16, **SAME, out_groups=GROUPS)),
    "conv route": lambda: Routed(DynamicConv2d(16, 16, **SAME, out_groups=GROUPS)),
    "norm": lambda: DynamicBatchNorm2d(16, groups=GROUPS),
    "norm of the batch": lambda: DynamicBatchNorm2d(16, groups=GROUPS, track_running_stats=False),
    "norm mask": lambda: Masked(DynamicBatchNorm2d(16, groups=GROUPS)),
    "block": lambda: Routed(ElasticBlock(16, 16, GROUPS + 1)),
    "bottleneck": lambda: Routed(BottleneckShape(16, 16, 16, 6, 1).build(GROUPS + 1)),
    "residual": Residual,
    "residual in place": lambda: Residual(inplace=True),
    "bottleneck op": Bottleneck,
    "bottleneck op in place": lambda: Bottleneck(inplace=True),
    "bottleneck op, composed": lambda: Bottleneck(24),
    "inverted residual": Inverted,
    "inverted residual in place": lambda: Inverted(inplace=True),
    "graph": Graph,
    "frozen block": lambda: frozen(ElasticBlock(16, 16, GROUPS + 1)),
    "frozen bottleneck": lambda: frozen(BottleneckShape(16, 16, 16, 6, 1).build(GROUPS + 1)),
    "plan of levels": lambda: Planned(masks=False),
    "plan of masks": lambda: Planned(masks=True),
}
INFERENCE = {
    *("residual", "residual in place", "graph", "frozen block", "frozen bottleneck"),
    *("bottleneck op", "bottleneck op in place", "bottleneck op, composed"),
    *("inverted residual", "inverted residual in place"),
}
PLANS = {"plan of levels", "plan of masks"}


def module(name: str) -> nn.Module:
    """One of them in eval mode, with seeded weights."""
    torch.manual_seed(0)
    made = MODULES[name]().eval()
    for norm in made.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return made
