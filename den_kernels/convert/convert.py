"""Residual branches in models written by others, made elastic in place."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .build import routed_layers
from .carrier import Carrier, Remember, Shared
from .forms import fuse
from .order import sort_by_l1
from .prove import prove
from .record import Node, Recording, example_of, record
from .region import Region, branch_of, find_region, is_depthwise, separable, sums
from .report import Block, LeftAlone, Report
from .rules import Unfit, describe, is_norm

_OP = "convert"
Blocks = Literal["auto"] | Sequence[str] | Callable[[str, nn.Module], bool]


@dataclass(eq=False)
class _Found:
    name: str
    region: Region
    sum: Node | None  # None of a block without a shortcut


def convert(
    model: nn.Module,
    groups: int | Sequence[float] = 4,
    *,
    blocks: Blocks = "auto",
    order: Literal["none", "l1"] = "none",
    example: Tensor | tuple | Mapping[str, Any] | None = None,
) -> Report:
    """Make the residual branches of a model elastic: instances of a batch may use only some of the hidden channels.

    The model is changed in place and stays what it was: `model(x)` is the same bit for bit, its state_dict has the same
    keys. Levels reach it with `levels(model, levels)` or an `ElasticModel`; at level 0 an instance keeps its shortcut.

    Branches are found in a recorded run and proved by another: a branch whose layers at random parameters do not
    compute what the branch with masked channels does is left alone, and the report says why.

    Args:
        model: with convolutions and batch norms of `torch.nn`. Running statistics and modes are not touched.
        groups: channel groups of each block, or their shares of the hidden channels: `(1, 1, 2)` are a quarter, a
            quarter and a half. With cardinality they lie on its boundaries.
        blocks: "auto" for all that are found, names of the report's, or a predicate `(name, module) -> bool`.
        order: "l1" sorts hidden channels by importance first, so that low levels keep the important ones. The model
            computes the same function; its parameters are permuted. Hidden channels that a depthwise convolution makes
            of the block's input keep their order.
        example: an input (or arguments, as a tuple or a mapping) for the recorded run; None: one image of the size that
            the model says it takes (`in_size`, `default_cfg`), 224 x 224 if it says nothing.

    Returns:
        What was made elastic and what was left alone, with the reasons. `print(report)` shows it.

    Raises:
        ValueError: no block was found, a name is none of the blocks', groups or order are not as above, the model is
            converted already.
    """
    shares = _shares(groups)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model must be an nn.Module, got {type(model).__name__}")
    if order not in ("none", "l1"):
        raise ValueError(f"{_OP}: order must be 'none' or 'l1', got {order!r}")
    if any(isinstance(getattr(module, "carrier", None), Carrier) for module in model.modules()):
        raise ValueError(f"{_OP}: model must not be converted already, got {type(model).__name__} with elastic blocks")
    with torch.random.fork_rng():  # the caller's generators stay as they are, and so does what is proved
        torch.manual_seed(0)
        args, kwargs = example_of(model, example, _OP)
        recording = record(model, args, kwargs)
        found, left = _blocks(model, recording, shares)
        chosen = _chosen(model, found, left, blocks)
        if not chosen:
            raise ValueError(_nothing(model, recording, left))
        if order == "l1":
            for each in chosen:
                sort_by_l1(each.region)
        made = _install(model, recording, chosen, shares)
    return Report(made, tuple(left), len(shares), shares)


def _install(
    model: nn.Module, recording: Recording, chosen: Sequence[_Found], shares: Sequence[float]
) -> tuple[Block, ...]:
    """Put routed layers in the place of the blocks' own, and fused forwards where there are such; the blocks."""
    shared = Shared(tuple(_block(each, shares) for each in chosen), shares)
    carrier, routed = Carrier(shared), []
    for n, each in enumerate(chosen):
        modules = {layer.node.index: layer.node.target for layer in each.region.layers}
        routed.append(routed_layers(each.region, shares, carrier, n, modules))
    for layers in routed:
        for index, layer in layers.items():
            model.set_submodule(recording.nodes[index].name, layer)
    model.register_forward_hook(Remember(carrier))
    made = []
    for each, layers, block in zip(chosen, routed, shared.blocks, strict=True):
        kernel = None
        if each.name and (each.sum is None or each.sum.scope == each.name):
            kernel = fuse(model.get_submodule(each.name), each.name, recording, each.region, each.sum, layers)
        made.append(replace(block, kernel=kernel or block.kernel))
    shared.blocks = tuple(made)
    return shared.blocks


def _shares(groups: int | Sequence[float]) -> tuple[float, ...]:
    if isinstance(groups, int) and not isinstance(groups, bool) and groups >= 1:
        return (1.0,) * groups
    if isinstance(groups, Sequence) and groups and all(isinstance(g, (int, float)) and g > 0 for g in groups):
        return tuple(map(float, groups))
    raise ValueError(f"{_OP}: groups must be a number of groups or their shares, all positive, got {groups!r}")


def _blocks(model: nn.Module, recording: Recording, shares: Sequence[float]) -> tuple[list[_Found], list[LeftAlone]]:
    """The blocks that can be made elastic, in the order of the run, and the sums and blocks that cannot."""
    found: list[_Found] = []
    left: list[LeftAlone] = []
    taken: set[int] = set()
    for name, node, search in _candidates(model, recording, found):
        try:
            region = search()
            _check(model, recording, region, taken)
            prove(recording, region, shares)
        except Unfit as why:
            left.append(LeftAlone(name, str(why)))
            continue
        taken |= {layer.node.index for layer in region.layers}
        found.append(_Found(name or _common(region), region, node))
    found.sort(key=lambda each: each.region.path[0].index)
    return found, left


def _candidates(
    model: nn.Module, recording: Recording, found: list[_Found]
) -> Iterator[tuple[str, Node | None, Callable[[], Region]]]:
    """Places where a block may be, in three groups: every sum; modules without a sum, of the classes of the blocks
    `found` by then; where inverted residuals are, separable convolutions, as in the first block of MobileNets."""
    for node in sums(recording):
        yield node.scope, node, lambda node=node: branch_of(recording, node)  # type: ignore[misc]
    classes = {type(model.get_submodule(each.name)) for each in found if each.name and each.sum is not None}
    classes -= {type(model), nn.Sequential}
    with_sum = {node.scope for node in sums(recording)}
    for name, module in model.named_modules():
        if type(module) in classes and name not in with_sum and (result := recording.results.get(name)) is not None:
            within = _within(recording, name)
            yield name, None, lambda end=result.node, w=within: find_region(recording, end, w, False)  # type: ignore[misc]
    if not any(is_depthwise(node) for each in found for node in each.region.weights):
        return
    taken = {layer.node.index for each in found for layer in each.region.layers}
    for name, module in model.named_modules():
        if type(module) not in (type(model), nn.Sequential) and (result := recording.results.get(name)) is not None:
            region = separable(recording, result.node, _within(recording, name))
            if region and taken.isdisjoint(layer.node.index for layer in region.layers):
                taken |= {layer.node.index for layer in region.layers}
                yield name, None, lambda region=region: region  # type: ignore[misc]


def _within(recording: Recording, name: str) -> set[int]:
    """The nodes that the forward of a module makes."""
    return {n.index for n in recording.nodes if f"{n.scope}.".startswith(f"{name}.")}


def _common(region: Region) -> str:
    """The path that the layers of a region share; of layers of the model itself the first one's."""
    paths = [layer.node.name.split(".") for layer in region.layers]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or region.layers[0].node.name


def _check(model: nn.Module, recording: Recording, region: Region, taken: set[int]) -> None:
    """Raises Unfit for layers that have to stay what they are."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for child in module._modules.values():
            owners[id(child)] = owners.get(id(child), 0) + 1
    holders = _holders(model)
    for layer in region.layers:
        node, module = layer.node, layer.node.target
        if node.index in taken:
            raise Unfit(f"{describe(node)} belongs to another block")
        if recording.calls[id(module)] > 1 or owners[id(module)] > 1:
            calls, places = recording.calls[id(module)], owners[id(module)]
            raise Unfit(f"{describe(node)} is shared: it runs {calls} times and stands in {places} places")
        if any(holders[id(p)] > 1 for p in module.parameters(recurse=False)):
            raise Unfit(f"{describe(node)} shares a parameter with another module")
        if is_parametrized(module):
            raise Unfit(f"{describe(node)} is parametrized")
        if hooks := _hooks(module):
            raise Unfit(f"{describe(node)} has hooks ({hooks}), which would be lost")
        if len(node.inputs) != 1 or len(node.args) != 1 or node.kwargs:
            raise Unfit(f"{describe(node)} is called with more than its input")


def _holders(model: nn.Module) -> dict[int, int]:
    """The number of modules that hold each parameter, by its id."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def _hooks(module: nn.Module) -> str:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return ", ".join(kind.strip("_") for kind in kinds if getattr(module, kind))


def _chosen(model: nn.Module, found: list[_Found], left: list[LeftAlone], blocks: Blocks) -> list[_Found]:
    """The blocks that the caller asked for; the others are then left alone."""
    if blocks == "auto":
        return found
    if callable(blocks):
        wanted = {each.name for each in found if blocks(each.name, model.get_submodule(each.name))}
    else:
        wanted = {blocks} if isinstance(blocks, str) else set(blocks)
        if missing := wanted - {each.name for each in found}:
            known = ", ".join(each.name for each in found) or "none"
            why = "".join(f"; {each.name}: {each.reason}" for each in left if each.name in missing)
            raise ValueError(f"{_OP}: blocks must be among {known}, got {', '.join(sorted(missing))}{why}")
    left += [LeftAlone(each.name, "not asked for") for each in found if each.name not in wanted]
    return [each for each in found if each.name in wanted]


def _block(found: _Found, shares: Sequence[float]) -> Block:
    region = found.region
    spaces = []
    for node in region.weights[:-1]:
        layer = next(each for each in region.layers if each.node is node)
        assert layer.writes is not None
        channels = node.target.weight.shape[0]
        spaces.append(layer.writes.sizes(channels, shares))
    names = tuple(layer.node.name for layer in region.layers)
    kind = _kind_of_block(region, found.sum)
    return Block(found.name, kind, "dynamic convolutions", tuple(spaces), int(found.sum is None), names)


def _nothing(model: nn.Module, recording: Recording, left: Sequence[LeftAlone]) -> str:
    kinds: dict[str, int] = {}
    for node in recording.nodes:
        if node.is_module:
            kinds[type(node.target).__name__] = kinds.get(type(node.target).__name__, 0) + 1
    seen = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "no module of torch.nn"
    why = "".join(f"\n  {each.name or 'model'}: {each.reason}" for each in left)
    return (
        f"{_OP}: model must have a sum of a shortcut and a branch with two convolutions or linear layers in a row, got "
        f"none in {type(model).__name__} ({len(sums(recording))} sums; {seen}){why}"
    )


def _kind_of_block(region: Region, node: Node | None) -> str:
    """The name of a branch's shape, with "pre-" or "post-activation" where a norm stands before or behind."""
    weights = [each.target for each in region.weights]
    name = _shape(weights)
    if region.has_gate:
        name += " with squeeze-excitation"
    if node is None:
        return f"{name} without a shortcut"
    tail = region.path[region.path.index(region.last) + 1 :]
    if name.startswith(("basic block", "bottleneck", "grouped bottleneck")):
        has_norm = any(is_norm(each) for each in tail)
        return f"{'post' if has_norm else 'pre'}-activation {name}"
    return name


def _shape(weights: list[nn.Module]) -> str:
    if all(isinstance(each, nn.Linear) or each.kernel_size == (1, 1) for each in weights) and len(weights) == 2:
        return "MLP"
    grouped = [each for each in weights if getattr(each, "groups", 1) > 1]
    if any(each.groups == each.in_channels for each in grouped):
        return "inverted residual"
    if len(weights) == 2:
        return "basic block"
    return "grouped bottleneck" if grouped else "bottleneck" if len(weights) == 3 else f"{len(weights)} convolutions"
