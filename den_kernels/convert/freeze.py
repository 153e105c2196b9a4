"""A converted model for inference alone."""

import copy
from typing import Any

import torch
from torch import nn

from .carrier import ElasticModel, carrier_of
from .fold import fold_norms
from .frozen import FrozenBlock, FrozenRow, fold_branch
from .frozen_conv import pack_convolutions
from .frozen_network import join_network
from .fused import FusedForward
from .pair import join_pairs
from .record import Recording, Ref, example_of, record
from .rules import kind_of

_OP = "freeze"


def freeze(model: nn.Module, example: Any = None) -> nn.Module:
    """A copy of a converted model for inference alone, at the levels that `levels` sets; the model itself stays.

    Batch norms are folded into the convolutions before them. Blocks of which the report says that an op runs them are
    modules of their own that hold the folded weights as the op reads them (of each level, where `recalibrate` measured
    statistics for each), and several in a row are one call: those that keep the shape of their map, and those whose
    shortcut is one convolution. Where all blocks are one such row, with a convolution, its ReLU and a max pooling in
    front, the mean of the map and a linear layer behind it, all of that is one call on a CPU. Two linear layers or
    1 x 1 convolutions with an activation between them, the MLP of ConvNeXt, are one op, too; other convolutions keep
    packed weights on a CPU. Weights are channels-last in memory; give it maps that are, too.

    The copy stays in evaluation mode, on its device and in its dtype, and its state_dict is none: save the model.
    torch.compile and torch.export see the ops with the weights as constants.

    example: as `convert` takes it.

    Raises ValueError for a model that was not converted.
    """
    if isinstance(model, ElasticModel):
        return ElasticModel(freeze(model.model, example), copy.deepcopy(model.selector).eval())
    carrier_of(model, _OP)
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        recording = record(frozen, *example_of(frozen, example, _OP))
    fused = {path: m.__dict__["forward"] for path, m in frozen.named_modules() if _is_fused(m)}
    blocks, taken = {}, []
    for path, forward in fused.items():
        try:
            weights = fold_branch(forward.branch, carrier_of(frozen).shared.groups)
        except (ValueError, TypeError):  # its statistics or shapes are none that the op takes
            del frozen.get_submodule(path).__dict__["forward"]
            continue
        groups = carrier_of(frozen).shared.groups
        blocks[path] = FrozenBlock(forward.branch, groups, weights, _may_write(recording, path))
        taken += forward.branch.modules
    fold_norms(frozen, recording, taken)
    frozen.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for path, block in blocks.items():
        frozen.set_submodule(path, block)
    pack_convolutions(frozen)
    rows = _join(frozen, recording, blocks)
    join_pairs(frozen, recording)
    if len(rows) == 1 and join_network(frozen, recording, rows[0]):
        _drop_empty(frozen, recording)
    return frozen


def _is_fused(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), FusedForward)


def _input(recording: Recording, path: str) -> int:
    """The node whose result a block reads."""
    [given] = recording.arguments[path]
    assert isinstance(given, Ref)
    return given.node


def _may_write(recording: Recording, path: str) -> bool:
    """Whether nobody but the block reads its input."""
    index = _input(recording, path)
    inside = all(f"{reader.scope}.".startswith(f"{path}.") for reader in recording.readers(index))
    node = recording.nodes[index]
    return inside and index not in recording.returned and node.target is not None and kind_of(node) not in _VIEWS


# What may share its result's memory with what it reads.
_VIEWS = {
    "view", "reshape", "flatten", "getitem", "permute", "transpose", "detach", "chunk", "split", "narrow", "expand",
    "squeeze", "unsqueeze", "contiguous", "to", "float", "identity", "dropout", "dropout2d", "sequential",
}  # fmt: skip


def _join(frozen: nn.Module, recording: Recording, blocks: dict[str, FrozenBlock]) -> list[list[str]]:
    """Put one call in the place of several blocks in a row: in that of the first one, and nothing in the others'.

    Returns the paths of the blocks of each row.
    """
    made: list[list[str]] = []
    row: list[str] = []
    order = sorted(blocks, key=lambda path: _input(recording, path))
    for path in order:
        joins = blocks[path].joins and blocks[path].may_write
        if joins and row and _follows(recording, blocks, row[-1], path):
            row.append(path)
            continue
        made += [row] if _replaced(frozen, blocks, row) else []
        row = [path] if joins else []
    made += [row] if _replaced(frozen, blocks, row) else []
    return made


def _follows(recording: Recording, blocks: dict[str, FrozenBlock], path: str, next: str) -> bool:
    """Whether the block `next` reads what the block `path` gives, and its levels stand in the next column."""
    return recording.results[path].node == _input(recording, next) and blocks[next].block == blocks[path].block + 1


def _replaced(frozen: nn.Module, blocks: dict[str, FrozenBlock], row: list[str]) -> bool:
    """Replace a row of at least two blocks of which one call runs all; True where that was done."""
    if len(row) < 2 or not FrozenRow([blocks[path] for path in row]).weights.whole:
        return False
    frozen.set_submodule(row[0], FrozenRow([blocks[path] for path in row]))
    for path in row[1:]:
        frozen.set_submodule(path, nn.Identity())
    return True


def _drop_empty(frozen: nn.Module, recording: Recording) -> None:
    """Put nothing in the place of each sequence of modules that do nothing, where it is called: that takes time."""
    for path, module in reversed(list(frozen.named_modules())):
        called = id(module) in recording.calls and not (module._forward_hooks or module._forward_pre_hooks)
        if path and type(module) is nn.Sequential and called and all(type(m) is nn.Identity for m in module):
            frozen.set_submodule(path, nn.Identity())
