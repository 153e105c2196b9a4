"""A region of the model is right if it computes what its layers do with the channels masked that are not selected."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .build import routed_layers
from .carrier import Carrier, Shared
from .record import Node, Recording, Ref
from .region import Region
from .report import Block
from .rules import NORMS, Unfit, describe
from .spaces import Space

_TOLERANCE = 1e-4  # of float32, against the root mean square of an instance; what is wired wrongly errs by about 1


@torch.no_grad()
def prove(recording: Recording, region: Region, shares: Sequence[float]) -> None:
    """Raises Unfit unless the region's routed layers compute the masked region: every level, all parameters random.

    Random parameters, because those of the model may hide a mistake: a last norm that starts with weight 0, a layer
    scale of 1e-6.
    """
    copies = {i: _randomised(recording.nodes[i].target) for i in _modules(recording, region)}
    carrier = Carrier(Shared((Block("", "", "", (), 0, ()),), shares))
    layers = routed_layers(region, shares, carrier, 0, copies)
    indices = sorted(region.inner | {node.index for node in region.path})
    end, own = Ref(region.path[-1].index), torch.empty(0)

    def masked(node: Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        result = (copies[node.index] if node.is_module else node.target)(*args, **kwargs)
        hidden = region.hidden.get(node.index)
        return result if hidden is None else result * _mask(own, *hidden, result.shape, shares)

    def elastic(node: Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        target = layers.get(node.index) or copies.get(node.index) or node.target
        return target(*args, **kwargs)

    for own in _batches(recording, region, len(shares)):
        values = _inputs(recording, region)
        try:
            exact = recording.replay(indices, _cloned(values), masked)[end]
            carrier.selections = carrier.plan(own[:, None])
            got = recording.replay(indices, _cloned(values), elastic)[end]
        except (RuntimeError, ValueError, TypeError) as why:
            raise Unfit(f"a run of the branch by itself fails: {why}") from None
        _compare(got, exact, own)


def _batches(recording: Recording, region: Region, groups: int) -> tuple[Tensor, ...]:
    """All levels, in batches of the recorded size: a model may have written it down, in `x.view(x.size(0), -1)`."""
    shape = recording.nodes[region.path[0].index].shape
    assert shape is not None
    lowest = 0 if region.skip else 1
    count = shape[0] * -(-(groups + 1 - lowest) // shape[0])
    levels = torch.arange(count, device=recording.device) % (groups + 1 - lowest) + lowest
    return levels.split(shape[0])


def _mask(levels: Tensor, space: Space, axis: int, shape: torch.Size, shares: Sequence[float]) -> Tensor:
    """1 where a channel is selected, of a shape that multiplies a hidden map."""
    sizes = torch.tensor(space.sizes(shape[axis], shares), device=levels.device)
    selected = levels[:, None] > torch.arange(len(sizes), device=levels.device)
    wide = [1] * len(shape)
    wide[0], wide[axis] = shape[0], shape[axis]
    return selected.repeat_interleave(sizes, 1).view(wide)


def _modules(recording: Recording, region: Region) -> list[int]:
    indices = region.inner | {node.index for node in region.path}
    return [i for i in indices if recording.nodes[i].is_module]


def _randomised(module: nn.Module) -> nn.Module:
    own = copy.deepcopy(module).float().eval()
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        getattr(own, hooks).clear()
    for parameter in own.parameters():
        parameter.uniform_(-1, 1).mul_((3 / max(1, parameter[0].numel())) ** 0.5)
    if isinstance(own, NORMS):
        for tensor, low, high in ((own.weight, 0.5, 1.5), (own.bias, -0.5, 0.5), (own.running_mean, -0.5, 0.5)):
            if tensor is not None:
                tensor.uniform_(low, high)
        if own.running_var is not None:
            own.running_var.uniform_(0.5, 1.5)
    return own


def _inputs(recording: Recording, region: Region) -> dict[Ref, Tensor]:
    """A random batch for each result that the region reads."""
    inside = region.inner | {node.index for node in region.path}
    read = {i for index in inside for i in recording.nodes[index].inputs} - inside
    values = {}
    for i in read:
        shape = recording.nodes[i].shape
        if shape is None:
            raise Unfit(f"{describe(recording.nodes[i])} gives several results")
        values[Ref(i)] = torch.randn(shape, device=recording.device)
    return values


def _cloned(values: dict[Ref, Tensor]) -> dict[Ref, Any]:
    return {ref: value.clone() for ref, value in values.items()}


def _compare(got: Tensor, exact: Tensor, levels: Tensor) -> None:
    if got.shape != exact.shape:
        raise Unfit(f"a run gives {list(got.shape)} where {list(exact.shape)} is expected")
    for b, level in enumerate(levels.tolist()):
        if level == 0:
            if bool(got[b].any()):
                raise Unfit("a run at level 0 gives more than the shortcut")
            continue
        size = float(exact[b].square().mean().sqrt())
        error = float((got[b] - exact[b]).abs().max())
        if not error <= _TOLERANCE * max(size, 1e-6):
            raise Unfit(f"a run at level {level} differs from the masked branch by {error / max(size, 1e-6):.2g}")
