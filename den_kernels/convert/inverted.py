"""Converted inverted residuals that run as one op at inference: `dynamic_inverted_residual`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..dynamic_inverted_residual import dynamic_inverted_residual
from ..fold_cache import FoldCache
from ..inverted_residual_weights import InvertedResidualWeights
from .carrier import Selection
from .layers import Routed, RoutedConv2d
from .record import Node, Recording
from .region import Region
from .rules import NEUTRAL, PRODUCTS, kind_of

INVERTED = "dynamic_inverted_residual"
_ACTIVATIONS = {name: name for name in ("relu", "relu6", "silu", "hardswish", "sigmoid", "hardsigmoid")}
_ACTIVATIONS |= {"swish": "silu", "hard_sigmoid": "hardsigmoid"}
_POOLS = ("adaptiveavgpool2d", "adaptive_avg_pool2d", "mean")


@dataclass(eq=False)
class InvertedBranch:
    """The modules of an inverted residual by their place in it: "conv1", "conv2", "conv3", "squeeze", "excite"."""

    named_convs: dict[str, RoutedConv2d]
    named_norms: dict[str, nn.BatchNorm2d]
    """By the convolution in front of them; the last one of a block without a shortcut knows no levels."""
    activations: dict[str, Any]
    """"activation", "squeeze_activation", "gate_activation", as the op takes them."""
    skip: bool
    """The block's input is added."""
    shortcut: None = None
    head: None = None
    reads_head: bool = False
    activated: bool = True
    kernel: str = INVERTED
    _cache: FoldCache[Any] = field(default_factory=FoldCache)

    @property
    def convs(self) -> tuple[RoutedConv2d, ...]:
        return tuple(self.named_convs.values())

    @property
    def norms(self) -> tuple[nn.BatchNorm2d, ...]:
        return tuple(self.named_norms.values())

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return (*self.convs, *self.norms)

    def weights(self) -> InvertedResidualWeights | None:
        """The parameters as the op takes them, folded once; None where the op does not run."""
        try:
            return self._cache.of(self.modules, self.fold)
        except (ValueError, TypeError):  # shapes that the op does not take
            return None

    def __call__(self, x: Tensor, selection: Selection, weights: Any) -> Tensor:
        """The block of x [B, C, H, W] at inference."""
        return dynamic_inverted_residual(x, selection.hidden, weights)

    def fold(self, convs: Any = None, norms: Any = None) -> InvertedResidualWeights:
        """The weights of the block, or of one with other convolutions and norms in the place of its own.

        Raises ValueError or TypeError for shapes that the op does not take.
        """
        conv = dict(zip(self.named_convs, convs or self.convs, strict=True))
        norm = dict(zip(self.named_norms, norms or self.norms, strict=True))
        return InvertedResidualWeights.fold(
            conv.get("conv1"), norm.get("conv1"), conv.get("conv2"), norm.get("conv2"), conv["conv3"],
            norm.get("conv3"), conv.get("squeeze"), conv.get("excite"), **self.activations, skip=self.skip,
        )  # fmt: skip


def inverted_branch(
    recording: Recording, region: Region, sum: Node | None, layers: Mapping[int, Routed]
) -> InvertedBranch | None:
    """The branch of a region that is one of an inverted residual, whatever stands around it; else None."""
    parts = list(_parts(recording, region.path, layers))
    kinds = [kind for kind, _ in parts if kind != "norm"]
    gated = "gate" in kinds
    acts = {kind for kind in kinds if kind in _ACTIVATIONS.values()}
    if len(acts) != 1:
        return None
    [act] = acts
    behind = [*(["gate"] if gated else []), "conv3"]
    if kinds not in (["conv1", act, "conv2", act, *behind], ["conv2", act, *behind]):
        return None
    named: dict[str, Any] = {kind: part for kind, part in parts if kind.startswith("conv")}
    norms = {parts[i - 1][0]: part for i, (kind, part) in enumerate(parts) if kind == "norm"}
    settings = {"activation": act}
    if gated:
        convs, settings_of_gate = dict(parts)["gate"]
        named |= convs
        settings |= settings_of_gate
    if not all(isinstance(conv, RoutedConv2d) for conv in named.values()) or any(k not in named for k in norms):
        return None
    return InvertedBranch(named, norms, settings, sum is not None)


def _parts(recording: Recording, path: Sequence[Node], layers: Mapping[int, Routed]) -> Iterator[tuple[str, Any]]:
    """What stands along a path, by its place: convolutions, norms, activations, a gate; "other" for all else."""
    convs = 0
    for n, node in enumerate(path):
        layer, kind = layers.get(node.index, node.target), kind_of(node)
        if isinstance(layer, RoutedConv2d):
            depthwise = layer.groups > 1
            convs = 2 if depthwise else 1 if not convs else 3
            yield f"conv{convs}", layer
        elif isinstance(layer, nn.BatchNorm2d):
            yield "norm", layer
            for child in layer.children():
                if (behind := type(child).__name__.lower()) not in NEUTRAL:
                    yield _ACTIVATIONS.get(behind, "other"), None
        elif kind in PRODUCTS and n and len(node.inputs) == 2:
            yield _product(recording, node, path[n - 1].index, layers)
        elif kind not in NEUTRAL:
            yield _ACTIVATIONS.get(kind, "other"), None


def _product(recording: Recording, node: Node, source: int, layers: Mapping[int, Routed]) -> tuple[str, Any]:
    """Of a product of `source` with what depends on it: "silu" of x * sigmoid(x), or the gate of an excitation."""
    [side] = [i for i in node.inputs if i != source] or [source]
    if _is_sigmoid_of(recording, side, source):
        return "silu", None
    chain = _chain(recording, side, source)
    kinds = [kind for kind, _ in chain]
    if len(kinds) != 5 or kinds[0] not in _POOLS or not {kinds[2], kinds[4]} <= set(_ACTIVATIONS):
        return "other", None
    acts = {"squeeze_activation": _ACTIVATIONS[kinds[2]], "gate_activation": _ACTIVATIONS[kinds[4]]}
    (_, squeeze), (_, excite) = chain[1], chain[3]
    return "gate", ({"squeeze": layers.get(squeeze.index), "excite": layers.get(excite.index)}, acts)


def _chain(recording: Recording, index: int, source: int) -> list[tuple[str, Node]]:
    """What makes the result `index` of `source`, in order; empty where that is no chain."""
    found: list[tuple[str, Node]] = []
    while index != source:
        node = recording.nodes[index]
        kind, inputs = kind_of(node), node.inputs
        if kind in PRODUCTS and len(inputs) == 2:
            kind, inputs = "silu", tuple(i for i in inputs if _is_sigmoid_of(recording, sum(inputs) - i, i))
        if len(inputs) != 1:
            return []
        if kind not in NEUTRAL:
            found.insert(0, (kind, node))
        [index] = inputs
    return found


def _is_sigmoid_of(recording: Recording, index: int, source: int) -> bool:
    node = recording.nodes[index]
    return kind_of(node) == "sigmoid" and node.inputs == (source,)
