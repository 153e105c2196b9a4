"""A frozen model from its stem to its logits as one call of `den_kernels.task_network`, with one task: a convolution,
its ReLU and pooling, a row of blocks, the mean of their map and a linear layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..eager import runs_eagerly
from ..plan import RoutingPlan
from ..task_network import DenseConv, DenseHead, TaskNetwork, runs_here, takes_conv
from .frozen import FrozenRow
from .frozen_conv import FrozenConv2d
from .record import Node, Recording
from .rules import kind_of

_BETWEEN = [nn.ReLU], [nn.ReLU, nn.MaxPool2d]  # a convolution and the blocks
_MOST_TAPS = {torch.float32: 49, torch.bfloat16: 9}  # with more, oneDNN is as fast


class FrozenNetwork(nn.Module):
    """The layers of a model in a row, of which the row of blocks is one; one call of C++ on a CPU.

    Where hooks watch one of them, levels are masks, or the call is traced or transformed, they are called one by one.

    sides: of the only images whose last map the pooling is the mean of; None: any.
    """

    def __init__(self, steps: Sequence[nn.Module], network: TaskNetwork, sides: tuple[int, int] | None) -> None:
        super().__init__()
        self.steps, self.network, self.sides = nn.ModuleList(steps), network, sides
        [row] = [step for step in steps if isinstance(step, FrozenRow)]
        self.carrier, self.numbers = row.carrier, row.numbers
        self.channels, self.dtype = network.stems[0].sizes[0], network.stems[0].weight.dtype
        # The dictionaries themselves: to ask all modules for them takes several times as long.
        self.hooks = tuple(kind for m in self.steps.modules() for kind in (m._forward_hooks, m._forward_pre_hooks))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> logits [B, O], at the levels that are set."""
        plan = self._plan(x)
        if plan is None:
            for step in self.steps:
                x = step(x)
            return x
        [logits] = self.network([0], [x], plan.levels.t())
        return logits

    def _plan(self, x: Tensor) -> RoutingPlan | None:
        """The plan of the blocks where one call runs all layers on x; None elsewhere."""
        if not runs_eagerly(x) or any(self.hooks) or torch.is_autocast_enabled("cpu"):
            return None
        if not x.is_cpu or x.dtype != self.dtype or x.ndim != 4 or x.shape[1] != self.channels:
            return None
        if self.sides is not None and self.sides != tuple(x.shape[2:]):
            return None
        plan = self.carrier.plan_of(self.numbers, x)
        return plan if plan.masks is None else None


def join_network(frozen: nn.Module, recording: Recording, row: Sequence[str]) -> bool:
    """Put a `FrozenNetwork` in the place of the stem of a model whose blocks are one row, and nothing in that of the
    other layers; False where the layers are of other kinds, or others read what lies between them.

    row: the paths of the row's blocks; the call stands in that of the first.
    """
    before, behind = _before(recording, row[0]), _behind(recording, row[-1])
    nodes = [*before, *behind]
    if not nodes or len(recording.nodes[nodes[-1].inputs[0]].shape or ()) != 2:
        return False
    if not all(_is_alone(frozen, recording, node) for node in nodes if node.is_module):
        return False
    stem = [step for node in before for step in _modules(frozen, node)]
    tail = [step for node in behind for step in _modules(frozen, node)]
    whole = frozen.get_submodule(row[0])
    sides = recording.nodes[before[0].inputs[0]].shape if before else None
    if sides is None or not isinstance(whole, FrozenRow):
        return False
    network = _network(stem, whole, tail)
    if network is None:
        return False
    mean, linear = tail
    everywhere = isinstance(mean, nn.AdaptiveAvgPool2d)
    if not (everywhere or _is_mean(mean, recording.nodes[behind[0].inputs[0]])):
        return False
    steps = [*stem, whole, mean, nn.Flatten(1), linear]
    for path in [*(node.name for node in nodes if node.is_module), row[0]]:
        frozen.set_submodule(path, nn.Identity())
    frozen.set_submodule(before[0].name, FrozenNetwork(steps, network, None if everywhere else tuple(sides[2:])))  # type: ignore[arg-type]
    return True


def _before(recording: Recording, path: str) -> list[Node]:
    """The convolution in front of a block that may write over its input, and the modules between them, each of which
    alone reads the one before."""
    [given] = recording.arguments[path]
    found: list[Node] = []
    index = given.node
    while recording.nodes[index].is_module and index not in recording.returned:
        node = recording.nodes[index]
        if len(node.inputs) != 1 or (found and len(recording.readers(index)) != 1):
            return []
        found.insert(0, node)
        if isinstance(node.target, nn.Conv2d):
            return found
        index = node.inputs[0]
    return []


def _behind(recording: Recording, path: str) -> list[Node]:
    """The linear layer behind a block and what lies between them, each of which alone reads the one before."""
    found: list[Node] = []
    index = recording.results[path].node
    while index not in recording.returned and len(readers := recording.readers(index)) == 1:
        [node] = readers
        if len(node.inputs) != 1 or not (node.is_module or _flattens(node)):
            return []
        found.append(node)
        if isinstance(node.target, nn.Linear):
            return found
        index = node.index
    return []


def _flattens(node: Node) -> bool:
    """True for a function that makes [B, C] of [B, C, 1, 1], and leaves [B, O] as it is."""
    if node.kwargs or node.shape is None or len(node.shape) != 2:
        return False
    sizes: Any = node.args[1:]
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else tuple(sizes)
    if kind_of(node) == "flatten":
        return sizes in ((1,), (1, -1))
    return kind_of(node) in ("view", "reshape") and sizes == (node.shape[0], -1)


def _is_alone(frozen: nn.Module, recording: Recording, node: Node) -> bool:
    """True for a module that stands in one place, runs once and has no hooks."""
    paths = [path for path, m in frozen.named_modules(remove_duplicate=False) if m is frozen.get_submodule(node.name)]
    own = frozen.get_submodule(node.name)
    watched = any(m._forward_hooks or m._forward_pre_hooks for m in own.modules())
    return len(paths) == 1 and recording.calls[id(node.target)] == 1 and not watched


def _modules(frozen: nn.Module, node: Node) -> list[nn.Module]:
    """What stands in the place of a node's module, without what does nothing."""
    if not node.is_module:
        return []
    own = frozen.get_submodule(node.name)
    parts = list(own) if type(own) is nn.Sequential else [own]
    return [part for part in parts if type(part) not in (nn.Identity, nn.Dropout, nn.Flatten)]


def _network(stem: list[nn.Module], row: FrozenRow, tail: list[nn.Module]) -> TaskNetwork | None:
    """The weights of all layers for one call; None where they are of other kinds or shapes than that takes."""
    if not stem:
        return None
    conv, *between = stem
    if type(conv) not in (nn.Conv2d, FrozenConv2d) or [type(m) for m in between] not in _BETWEEN:
        return None
    if [type(m) for m in tail] not in ([nn.AdaptiveAvgPool2d, nn.Linear], [nn.AvgPool2d, nn.Linear]):
        return None
    assert isinstance(conv, nn.Conv2d)
    mean, linear = tail
    assert isinstance(linear, nn.Linear)
    window = _window(between[1]) if len(between) == 2 else (0, 1, 0)
    dtype = conv.weight.dtype
    few = conv.kernel_size[0] * conv.kernel_size[1] <= _MOST_TAPS.get(dtype, 0)
    whole = not isinstance(mean, nn.AdaptiveAvgPool2d) or mean.output_size in (1, (1, 1))
    if window is None or not (few and whole and takes_conv(conv) and runs_here(dtype) and conv.weight.is_cpu):
        return None
    if not row.weights.blocks[-1].relu or linear.weight.dtype != dtype:
        return None
    return TaskNetwork(
        (DenseConv.of(conv, conv.weight.detach(), _bias_of(conv), window),),
        row.weights,
        (DenseHead(linear.weight.detach().contiguous(), _bias_of(linear)),),
    )


def _is_mean(pool: nn.Module, node: Node) -> bool:
    """True where an average pooling takes the mean of all of a node's map."""
    assert isinstance(pool, nn.AvgPool2d)
    assert node.shape is not None
    plain = _pair(pool.padding) == (0, 0) and pool.divisor_override is None
    return plain and _pair(pool.kernel_size) == tuple(node.shape[2:])


def _bias_of(layer: nn.Conv2d | nn.Linear) -> Tensor:
    bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
    return bias.detach().contiguous()


def _window(pool: nn.Module) -> tuple[int, int, int] | None:
    """The size, stride and padding of a max pooling; None of one that is not square, dilated or rounds up."""
    assert isinstance(pool, nn.MaxPool2d)
    (size, *rest) = {*_pair(pool.kernel_size)}
    (stride, *more), (padding, *others) = {*_pair(pool.stride)}, {*_pair(pool.padding)}
    plain = _pair(pool.dilation) == (1, 1) and not pool.ceil_mode and not pool.return_indices
    return None if rest or more or others or not plain else (size, stride, padding)


def _pair(value: Any) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)
