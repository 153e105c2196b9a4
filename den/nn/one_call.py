"""An estimator or a selector at inference on a CPU as one call of the kernels' library (`den_kernels.task_network`)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from den.nn.ends import ConvNormReLU, Stem
from den.nn.folding import folded_weight
from den.nn.task_batch import TaskBatch
from den_kernels import TrunkWeights
from den_kernels.building import (
    DenseConv,
    DenseHead,
    FoldCache,
    Standing,
    TaskNetwork,
    are_watched,
    may_fold,
    norm_affine,
    runs_task_network,
    takes_conv,
)


@dataclass(frozen=True)
class Layers:
    """Layers that a network of one call is folded from.

    Attributes:
        modules: these layers, none of which runs by itself then.
        settings: gives what else the folded weights depend on, in every call.
        standing: the state of the modules by which these were chosen.
    """

    modules: tuple[nn.Module, ...]
    settings: Callable[[], Iterable[object]]
    standing: Standing


class OneCall:
    """Keeps the folded weights of stems, shared layers and heads while nothing that they were made of changes."""

    def __init__(self) -> None:
        self._cache: FoldCache[TaskNetwork | None] = FoldCache()
        self._layers: tuple[Layers, tuple[object, ...]] | None = None

    def network(
        self,
        owner: nn.Module,
        batch: TaskBatch,
        layers: Callable[[], Layers | None],
        build: Callable[[], TaskNetwork | None],
        *settings: object,
    ) -> TaskNetwork | None:
        """The network of `owner` that runs a batch in one call; None where layers have to be called one by one.

        layers: finds what `build` folds, None where it does not; settings: of the owner, which both read. What `layers`
        returns must not refer to the owner, which would not be freed until Python looks for cycles.
        """
        dtype = batch.images[0].dtype
        for images in batch.images:
            if not images.is_cpu or images.dtype != dtype or type(images) is not Tensor:
                return None
        if not may_fold(owner) or not runs_task_network(dtype):
            return None
        chosen = self._chosen(layers, settings)
        if chosen is None:
            return None
        found = self._cache.of(chosen.modules, build, *chosen.settings())
        return found if found is not None and found.heads[0].weight.dtype == dtype else None

    def _chosen(self, layers: Callable[[], Layers | None], settings: tuple[object, ...]) -> Layers | None:
        """The layers as they were found, as long as they stand there; found anew where they do not."""
        kept = self._layers
        if kept is not None and kept[1] == settings and kept[0].standing.holds():
            return kept[0]
        self._layers, chosen = None, layers()
        if chosen is None or are_watched(chosen.modules):
            return None
        chosen.standing.keep_plain(chosen.modules)
        self._layers = chosen, settings
        return chosen

    def __deepcopy__(self, memo: dict) -> "OneCall":
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()


def folded(layer: ConvNormReLU) -> DenseConv:
    """A convolution, its norm and ReLU, as the kernel reads them."""
    return DenseConv.of(layer.conv, *folded_weight(layer.conv, layer.norm))


def fits(stems: Iterable[nn.Module], heads: Iterable[nn.Module], convs: Iterable[nn.Module] = ()) -> bool:
    """True where the kernel takes layers of these kinds, dtypes and sizes on this machine."""
    stems, layers, heads = list(stems), list(convs), list(heads)
    layers += [stem.conv for stem in stems if isinstance(stem, Stem)]
    weights = [head.weight for head in heads if type(head) is nn.Linear and head.bias is not None]
    for layer in layers:
        if not isinstance(layer, ConvNormReLU) or not takes_conv(layer.conv):
            return False
        weights.append(layer.conv.weight)
    if not stems or any(type(stem) is not Stem for stem in stems) or len(weights) < len(heads) + len(layers):
        return False
    dtypes = {weight.dtype for weight in weights}
    return all(weight.is_cpu for weight in weights) and len(dtypes) == 1 and runs_task_network(dtypes.pop())


def trunk_network(stems: Sequence[Stem], trunk: TrunkWeights, heads: Iterable[nn.Linear]) -> TaskNetwork:
    """The network of an estimator."""
    return TaskNetwork(
        tuple(folded(stem.conv) for stem in stems),
        trunk,
        tuple(DenseHead(head.weight.detach().contiguous(), head.bias.detach()) for head in heads),
        tuple(stem.in_size for stem in stems),
    )


def conv_network(
    stems: Sequence[Stem],
    convs: Iterable[ConvNormReLU],
    norms: Iterable[nn.BatchNorm1d],
    heads: Iterable[nn.Linear],
) -> TaskNetwork:
    """The network of a selector, a norm before each head."""
    return TaskNetwork(
        tuple(folded(stem.conv) for stem in stems),
        tuple(map(folded, convs)),
        tuple(
            DenseHead(head.weight.detach().contiguous(), head.bias.detach(), *norm_affine(norm, torch.float32))
            for head, norm in zip(heads, norms, strict=True)
        ),
        tuple(stem.in_size for stem in stems),
    )
