"""A graph of convolutions as `dynamic_graph` takes it: checked, and packed for the direct kernel where that runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import _conv_direct
from ._extension import extension
from ._geometry import Geometry
from ._handle import HasHandle

_OP = "dynamic_graph"
STATES_BYTES = 2 << 20  # an instance's states: about what a core's cache holds; beyond, they are computed in bands
MOST_BYTES = 1 << 28  # of an instance's states, which a thread keeps in memory between calls


@dataclass(frozen=True, eq=False)
class GraphWeights(HasHandle):
    """A graph over states 0 to N - 1, and the convolutions of its edges: made by :meth:`pack`."""

    states: int
    """N."""
    edges: tuple[tuple[int, int], ...]
    """(i, j) of each edge, i < j, in the order of j."""
    weights: tuple[Tensor, ...]
    """[C, C, R, S] of each edge; R, S odd."""
    biases: tuple[Tensor, ...]
    """[C] of each edge."""
    direct: tuple[Tensor, ...] = ()
    """The weights as the direct kernels read them, where one runs."""

    @staticmethod
    def pack(
        states: int, edges: Sequence[tuple[int, int]], weights: Sequence[Tensor], biases: Sequence[Tensor]
    ) -> "GraphWeights":
        """Pack a graph for inference: weights [C, C, R, S] and biases [C], one for each edge (i, j), i < j < states.

        Raises ValueError for edges, weights or biases that do not fit each other.
        """
        edges, biases = tuple(edges), tuple(bias.contiguous() for bias in biases)
        weights = tuple(w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights)
        if any(not 0 <= i < j < states for i, j in edges) or list(edges) != sorted(edges, key=lambda edge: edge[1]):
            raise ValueError(
                f"{_OP}: edges must be (i, j) with 0 <= i < j < {states}, in the order of j, got {list(edges)}"
            )
        if not edges or len(weights) != len(edges) or len(biases) != len(edges):
            raise ValueError(
                f"{_OP}: weights and biases must be one for each of the {len(edges)} edges, at least one,"
                f" got {len(weights)} and {len(biases)}"
            )
        shape = weights[0].shape
        if len(shape) != 4 or shape[0] != shape[1] or shape[2] % 2 == 0 or shape[3] % 2 == 0:
            raise ValueError(f"{_OP}: weights must be [C, C, R, S] with odd R and S, got {list(shape)}")
        if any(w.shape != shape or bias.shape != shape[:1] for w, bias in zip(weights, biases, strict=True)):
            raise ValueError(f"{_OP}: weights must all be {list(shape)}, and biases [{shape[0]}], got others")
        kind = weights[0].dtype, weights[0].device
        if (other := next((t for t in (*weights, *biases) if (t.dtype, t.device) != kind), None)) is not None:
            got = f"{other.dtype} on {other.device}"
            raise ValueError(f"{_OP}: weights and biases must all be {kind[0]} on {kind[1]}, got {got}")
        like = weights[0].new_empty(1, shape[1], 1, 1)
        runs = weights[0].dtype == torch.float32 and _conv_direct.runs_direct(
            like, weights[0], Geometry((1, 1), (shape[2] // 2, shape[3] // 2), (1, 1), 1, (), ())
        )
        return GraphWeights(
            states, edges, weights, biases, tuple(_conv_direct.pack(w, ()) for w in weights) if runs else ()
        )

    @cached_property
    def handle(self) -> Any:
        """The direct kernel's own object for this graph, `extension.Graph`; of weights with `direct`."""
        C, _, R, S = self.weights[0].shape
        return extension.Graph(self.states, self.edges, C, (R, S), list(self.direct), list(self.biases))

    def runs_whole(self, x: Tensor) -> bool:
        """True where one call runs the whole graph for maps of the shape and dtype of x [B, C, H, W]."""
        B, C, H, W = x.shape
        size = 4 * self.states * C * H * W
        enough = size <= STATES_BYTES or (size <= MOST_BYTES and torch.get_num_threads() <= B)
        return bool(self.direct) and x.dtype == torch.float32 and enough
