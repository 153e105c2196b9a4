"""What a block is called in the report."""

from torch import nn

from .record import Node
from .region import Region
from .rules import is_norm


def kind_of_block(region: Region, node: Node | None) -> str:
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
