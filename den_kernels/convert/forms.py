"""Blocks of a recorded run that have the form of a fused op."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .carrier import Carrier
from .fused import Branch, FusedForward
from .inverted import InvertedBranch, inverted_branch
from .layers import Routed
from .record import Node, Recording, Ref, evaluating
from .region import Region
from .rules import NEUTRAL, kind_of

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the op against the layers


def fuse(
    block: nn.Module, name: str, recording: Recording, region: Region, sum: Node | None, layers: Mapping[int, Routed]
) -> str | None:
    """Give a converted block the forward of a fused op, if it has the op's form; the name of the op.

    The op is run against the block's own forward first, at every level. sum: None of a block without a shortcut.
    """
    branch: Branch | InvertedBranch | None = _inverted(name, recording, region, sum, layers)
    if branch is None and sum is not None:
        branch = _branch(block, name, recording, region, sum, layers)
    if branch is None or branch.convs[0].weight.dtype not in _TOLERANCE or branch.weights() is None:
        return None
    fused = FusedForward(block, branch)
    if not _agrees(fused, recording, recording.arguments[name][0].node):
        return None
    block.__dict__["forward"] = fused
    return branch.kernel


def _branch(
    block: nn.Module, name: str, recording: Recording, region: Region, sum: Node, layers: Mapping[int, Routed]
) -> Branch | None:
    given, result = recording.arguments.get(name), recording.results.get(name)
    if sum.scope != name or given is None or len(given) != 1 or not isinstance(given[0], Ref) or result is None:
        return None
    x = _source(recording, given[0].node)
    kinds, modules = _chain([node for node in region.path if kind_of(node) not in NEUTRAL], layers)
    k = kinds.count("conv")
    post = ["conv", "norm", "relu"] * (k - 1) + ["conv", "norm"]
    is_post = kinds == post
    if k not in (2, 3) or (not is_post and kinds != post[:-1]):
        return None
    start = _source(recording, region.path[0].inputs[0])
    head = None if is_post else _head(recording, start, x)
    ends = recording.nodes[result.node]
    joined = kind_of(ends) == "relu" and ends.inputs == (sum.index,) if is_post else ends is sum
    if not joined or (is_post and start != x) or (not is_post and head is None):
        return None
    other = next(i for i in sum.inputs if i not in {node.index for node in region.path})
    found = _shortcut(block, name, recording, other, x, start)
    if found is None:
        return None
    convs = tuple(m for m in modules if isinstance(m, nn.Conv2d))
    norms = tuple(m for m in modules if isinstance(m, nn.BatchNorm2d))
    return Branch(convs, norms, head, *found, activated=_is_relu(recording, x))  # type: ignore[arg-type]


def _inverted(
    name: str, recording: Recording, region: Region, sum: Node | None, layers: Mapping[int, Routed]
) -> InvertedBranch | None:
    """The branch of a block that is an inverted residual: of its input, and alone or added to that."""
    given, result = recording.arguments.get(name), recording.results.get(name)
    if given is None or len(given) != 1 or not isinstance(given[0], Ref) or result is None:
        return None
    x, end = _source(recording, given[0].node), _source(recording, region.path[-1].index)
    if _source(recording, region.path[0].inputs[0]) != x:
        return None
    if sum is None:
        return inverted_branch(recording, region, sum, layers) if _source(recording, result.node) == end else None
    others = [i for i in sum.inputs if _source(recording, i) == x]
    if _source(recording, result.node) != sum.index or len(others) != 1 or len(sum.args) != 2 or sum.kwargs:
        return None
    return inverted_branch(recording, region, sum, layers)


def _source(recording: Recording, index: int) -> int:
    """The node itself, or the one whose result a neutral node passes on."""
    while kind_of(recording.nodes[index]) in NEUTRAL:
        [index] = recording.nodes[index].inputs
    return index


def _is_relu(recording: Recording, index: int) -> bool:
    """True for the result of a ReLU, or of a maximum over such results."""
    node = recording.nodes[_source(recording, index)]
    if kind_of(node) == "maxpool2d":
        return _is_relu(recording, node.inputs[0])
    return kind_of(node) == "relu"


def _chain(path: Sequence[Node], layers: Mapping[int, Routed]) -> tuple[list[str], list[nn.Module]]:
    """What stands along a path: "conv", "norm", "relu" or the kind of something else; and the routed layers."""
    kinds: list[str] = []
    modules: list[nn.Module] = []
    for node in path:
        layer = layers.get(node.index)
        if layer is None:
            kinds.append(kind_of(node))
            continue
        modules.append(layer)
        kinds.append(
            "conv" if isinstance(layer, nn.Conv2d) else "norm" if isinstance(layer, nn.BatchNorm2d) else "linear"
        )
        behind = [type(child).__name__.lower() for child in layer.children()]
        kinds += [kind for kind in behind if kind not in NEUTRAL]
    return kinds, modules


def _head(recording: Recording, start: int, x: int) -> nn.BatchNorm2d | None:
    """The norm of relu(norm(x)), where that is what a node computes."""
    relu = recording.nodes[start]
    if kind_of(relu) != "relu" or len(relu.inputs) != 1:
        return None
    norm = recording.nodes[_source(recording, relu.inputs[0])]
    plain = type(norm.target) is nn.BatchNorm2d and norm.target.running_mean is not None
    return norm.target if plain and _source(recording, norm.inputs[0]) == x else None


def _shortcut(
    block: nn.Module, name: str, recording: Recording, other: int, x: int, start: int
) -> tuple[nn.Module | None, bool] | None:
    """The module that computes the shortcut, None for the block's input; and whether it reads relu(norm(x))."""
    if _source(recording, other) == x:
        return None, False
    for path, module in block.named_modules():
        given = recording.arguments.get(f"{name}.{path}")
        if path and recording.results.get(f"{name}.{path}") == Ref(other) and given and isinstance(given[0], Ref):
            read = _source(recording, given[0].node)
            if len(given) == 1 and read in (x, start):
                return module, read != x
    return None


@torch.no_grad()
def _agrees(fused: FusedForward, recording: Recording, given: int) -> bool:
    """True where the op computes what the block's own forward does, at every level."""
    shape, conv = recording.nodes[given].shape, fused.branch.convs[0]
    if shape is None or len(shape) != 4:
        return False
    G, weight = len(conv.out_groups), conv.weight
    carrier: Carrier = conv.carrier
    own = torch.arange(carrier.shared.blocks[conv.block].lowest, G + 1, device=weight.device)
    x = torch.randn(len(own), *shape[1:], device=weight.device, dtype=weight.dtype).relu_()
    levels = torch.full((len(own), len(carrier.shared.blocks)), G, device=weight.device)
    levels[:, conv.block] = own
    carrier.selections = carrier.plan(levels)
    try:
        with evaluating(fused.block):
            wanted = type(fused.block).forward(fused.block, x.clone()).float()
            got = fused(x.clone()).float()
    finally:
        carrier.selections = None
    size = float(wanted.square().mean().sqrt())
    return got.shape == wanted.shape and float((got - wanted).abs().max()) <= _TOLERANCE[weight.dtype] * max(size, 1e-6)
