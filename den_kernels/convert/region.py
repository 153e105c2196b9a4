"""Elastic regions of a recorded run: the part of a branch between its first and its last layer with hidden channels.

x -- (norm, activation) -- W_i -- norm, activation, gate -- ... -- W_k -- norm, scale -- sum with the shortcut
                            |<------- hidden channels ------->|         |<-- tail -->|
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from .record import Node, Recording, Ref
from .rules import PRODUCTS, Unfit, channel_axis, describe, has_weight, is_norm, keeps_zero, reorders_axes
from .spaces import Space


@dataclass(frozen=True)
class Elastic:
    """What is known of a map with hidden channels."""

    space: Space
    axis: int
    zero: bool  # channels that are not selected hold 0
    shape: torch.Size

    @property
    def channels(self) -> int:
        return self.shape[self.axis]


@dataclass(eq=False)
class Layer:
    """A module of a region that has to know the levels."""

    node: Node
    reads: Space | None = None
    writes: Space | None = None
    """Of a norm the space of its channels; None of one in the tail."""
    closes: bool = False
    """Its result is nothing at level 0, bias and norm included."""


@dataclass(eq=False)
class Region:
    """Where a branch is elastic."""

    layers: list[Layer]
    path: list[Node]
    """From W_i to the end of the branch."""
    last: Node
    """W_k."""
    inner: set[int]
    """The nodes from W_i to W_k, gates included."""
    hidden: dict[int, tuple[Space, int]]
    """The space and the axis of each inner result that holds 0 in channels that are not selected."""
    has_gate: bool
    """Squeeze and excitation between them."""
    skip: bool
    """The branch is added to a shortcut."""

    @property
    def weights(self) -> list[Node]:
        """W_i to W_k."""
        return [node for node in self.path[: self.path.index(self.last) + 1] if has_weight(node)]


def main_path(recording: Recording, end: int) -> list[Node]:
    """The nodes from the end of a branch backwards, as far as each reads one result, or a result and a gate of it or
    what parameters make."""
    path = []
    node = recording.nodes[end]
    while True:
        path.append(node)
        inputs = node.inputs
        if len(inputs) == 2 and node.name in PRODUCTS:
            a, b = inputs
            if a in recording.ancestors(b) or recording.is_constant(b):
                inputs = (a,)
            elif b in recording.ancestors(a) or recording.is_constant(a):
                inputs = (b,)
        if len(inputs) != 1 or node.target is None:
            return path
        node = recording.nodes[inputs[0]]


def find_region(recording: Recording, end: int, within: Collection[int], skip: bool = True) -> Region:
    """The longest elastic region of the branch that ends with a node; `within`: the nodes it may consist of.

    skip: the branch is added to a shortcut, so that at level 0 nothing of it remains. Raises Unfit with the reason
    where there is none.
    """
    path = [node for node in reversed(main_path(recording, end)) if node.index in within]
    weights = [node for node in path if has_weight(node)]
    while weights and getattr(weights[-1].target, "groups", 1) > 1:  # mixes no channels: part of the tail
        weights.pop()
    reason = Unfit("no two convolutions or linear layers follow each other along the branch")
    for first in weights[:-1]:
        try:
            return _Search(recording, path[path.index(first) :], weights[-1], skip).region()
        except Unfit as why:
            reason = why
    raise reason


class _Search:
    """Follows the hidden channels from the first layer to the last."""

    def __init__(self, recording: Recording, path: list[Node], last: Node, skip: bool) -> None:
        self.recording, self.path, self.last, self.skip = recording, path, last, skip
        inner = path[: path.index(last) + 1]
        self.path_indices = {node.index for node in inner}
        self.gates = self._gates(inner[1:-1])
        self.gate_ends = {g for gate in self.gates for g in gate[1]}
        self.allowed = self.path_indices.union(*(gate[0] for gate in self.gates))
        self.elastic: dict[int, Elastic] = {}
        self.layers: list[Layer] = []

    def _gates(self, inner: list[Node]) -> list[tuple[set[int], set[int]]]:
        """Of each product on the path the nodes of its gate, and the last layer of the gate."""
        gates = []
        for node in inner:
            if len(node.inputs) == 2:
                sides = [i for i in node.inputs if i not in self.path_indices]
                if len(sides) != 1:
                    raise Unfit(f"{describe(node)} joins the hidden channels with others")
                [source] = set(node.inputs) - set(sides)
                before = {*sides, *self.recording.ancestors(sides[0])}
                nodes = {i for i in before if source in self.recording.ancestors(i)}
                if not nodes:
                    raise Unfit(f"{describe(node)} has a weight for each hidden channel")
                end = next((n.index for n in main_path(self.recording, sides[0]) if has_weight(n)), -1)
                gates.append((nodes, {end} & nodes))
        return gates

    def region(self) -> Region:
        first = self.path[0]
        for index in sorted(self.allowed):
            node = self.recording.nodes[index]
            read = [self.elastic[i] for i in node.inputs if i in self.elastic]
            if has_weight(node):
                self._layer(node, read[0] if read else None, index == first.index)
            elif read:
                self._other(node, read)
        self._check_readers()
        self._tail()
        hidden = {i: (e.space, e.axis) for i, e in self.elastic.items() if e.zero}
        return Region(self.layers, self.path, self.last, self.allowed, hidden, bool(self.gate_ends), self.skip)

    def _layer(self, node: Node, read: Elastic | None, is_first: bool) -> None:
        """A convolution or linear layer: of the path, or of a gate."""
        layer, module = Layer(node), node.target
        linear = isinstance(module, torch.nn.Linear)
        shape = node.shape
        assert shape is not None
        axis, groups = (len(shape) - 1, 1) if linear else (1, module.groups)
        channels = shape[axis]
        if not linear and len(shape) != 4:
            raise Unfit(f"{describe(node)} has no batch")
        if read is not None:
            if read.axis != (len(read.shape) - 1 if linear else 1):
                raise Unfit(f"{describe(node)} does not read the hidden channels as its channels")
            if not read.zero:
                raise Unfit(f"{describe(node)} reads hidden channels that are not 0 where they are not selected")
            layer.reads = read.space
            if groups > 1:
                read.space.coarsen(groups)
        on_path = node.index in self.path_indices
        ends_gate = node.index in self.gate_ends and not on_path
        if node is not self.last and (on_path or ends_gate or groups > 1):
            layer.writes = self._written(layer, groups, channels, ends_gate)
            self.elastic[node.index] = Elastic(layer.writes, axis, True, shape)  # what is not selected is exactly 0
        if is_first or layer.reads is not None or layer.writes is not None:
            self.layers.append(layer)

    def _written(self, layer: Layer, groups: int, channels: int, ends_gate: bool) -> Space:
        if layer.reads is not None and groups > 1:
            return layer.reads
        if ends_gate:
            return self._gated(layer.node, channels)
        space = Space(channels)
        if groups > 1:
            space.coarsen(groups)
        return space

    def _gated(self, node: Node, channels: int) -> Space:
        """The space of the map that a gate multiplies."""
        for product in self.path:
            others = [i for i in product.inputs if i in self.elastic]
            if len(product.inputs) == 2 and others and node.index in self.recording.ancestors(product.index):
                source = self.elastic[others[0]]
                if source.channels == channels:
                    return source.space
        raise Unfit(f"{describe(node)} gates a map of other channels than its own")

    def _other(self, node: Node, read: list[Elastic]) -> None:
        before = read[0]
        if node.shape is None:
            raise Unfit(f"{describe(node)} divides the hidden map")
        if is_norm(node):
            self.layers.append(Layer(node, writes=before.space))
            self.elastic[node.index] = Elastic(before.space, before.axis, True, node.shape)
        elif len(node.inputs) == 2:
            self._join(node, read)
        else:
            zero = before.zero if reorders_axes(node) else keeps_zero(node, before.zero)
            axis = channel_axis(node, before.axis, before.shape)
            self.elastic[node.index] = Elastic(before.space, axis, zero, node.shape)

    def _join(self, node: Node, read: list[Elastic]) -> None:
        """A product of two maps, or of a map and a gate."""
        wide = next((e for e in read if e.shape == node.shape), None)
        same = all(e.space is read[0].space and e.axis == read[0].axis for e in read)
        if node.name not in PRODUCTS or len(node.args) < 2 or wide is None or not same:
            raise Unfit(f"{describe(node)} joins the hidden channels with others")
        self.elastic[node.index] = Elastic(wide.space, wide.axis, any(e.zero for e in read), wide.shape)

    def _check_readers(self) -> None:
        for index in self.elastic:
            for reader in self.recording.readers(index):
                if reader.index not in self.allowed:
                    raise Unfit(f"its hidden channels are also read by {describe(reader)}")

    def _tail(self) -> None:
        """What makes the branch nothing at level 0: the norms behind the last layer, or where none is the layer."""
        if not self.skip:
            return
        tail = self.path[self.path.index(self.last) + 1 :]
        norms = [Layer(node, closes=True) for node in tail if is_norm(node)]
        self.layers += norms
        for layer in self.layers:
            if layer.node is self.last:
                layer.closes = not norms and layer.node.target.bias is not None


def sums(recording: Recording) -> list[Node]:
    """The nodes that add two results of the same shape."""
    found = []
    for node in recording.nodes:
        if node.name == "add" and len(node.inputs) == 2 and all(isinstance(value, Ref) for value in node.args[:2]):
            shapes = {recording.nodes[i].shape for i in node.inputs}
            if shapes == {node.shape}:
                found.append(node)
    return found


def branch_of(recording: Recording, node: Node) -> Region:
    """The elastic region of the branch that a sum adds to its shortcut; of two the one with more layers.

    A branch is what depends on the last result that both sides depend on. Raises Unfit with the reason where neither
    side has a region.
    """
    sides = [{i} | recording.ancestors(i) for i in node.inputs]
    regions, reason = [], Unfit("both sides of the sum are the same")
    for end, own, other in zip(node.inputs, sides, sides[::-1], strict=True):
        if own - other:
            try:
                regions.append(find_region(recording, end, own - other))
            except Unfit as why:
                reason = why
    if not regions:
        raise reason
    return max(regions, key=lambda region: len(region.weights))


def is_depthwise(node: Node) -> bool:
    """True where a node is a convolution of each channel by itself."""
    module = node.target
    return isinstance(module, torch.nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


def separable(recording: Recording, end: int, within: Collection[int]) -> Region | None:
    """The region of a module that is a depthwise convolution and a 1 x 1 convolution behind it, without a shortcut.

    end, within: as `find_region` takes them. None for other modules.
    """
    try:
        region = find_region(recording, end, within, False)
    except Unfit:
        return None
    weights = [node for node in main_path(recording, end) if node.index in within and has_weight(node)]
    if len(weights) != 2 or len(region.weights) != 2 or not is_depthwise(weights[1]):
        return None
    return region if getattr(weights[0].target, "kernel_size", None) == (1, 1) else None
