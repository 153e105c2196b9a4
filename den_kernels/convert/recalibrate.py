"""Batch norm statistics for each level of a converted model."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .carrier import carrier_of, levels
from .layers import RoutedBatchNorm2d
from .record import evaluating

_OP = "recalibrate"


def recalibrate(model: nn.Module, loader: Iterable[Any], *, progress: bool = True) -> None:
    """Measure the statistics of the elastic batch norms for each level, and use them from then on in evaluation.

    The sum of fewer channels has another mean and variance, so that a norm behind it needs statistics for each level
    (Yu et al., Slimmable Neural Networks, ICLR 2019). For each level the loader is run once, with all blocks at it; the
    statistics of a level are the mean over the batches. Those of the highest become the running statistics. The
    state_dict has `level_mean` and `level_var` [G, C] of each elastic norm from then on.

    loader: batches of images [B, C, H, W], or tuples whose first element they are; it is run through G times. The
    model's modes do not matter and stay. If the loader fails or is interrupted, nothing has changed.

    Raises ValueError for a model that was not converted or has no elastic batch norm with running statistics, and for a
    loader without a batch.
    """
    shared = carrier_of(model, _OP).shared
    norms = [m for m in model.modules() if isinstance(m, RoutedBatchNorm2d) and m.running_mean is not None]
    if not norms:
        raise ValueError(f"{_OP}: model must have elastic batch norms with running statistics, got none")
    rows = []
    with evaluating(model), _counting(norms):
        for level in range(1, shared.groups + 1):
            rows.append(_statistics(model, norms, loader, level, progress))
    with torch.no_grad():
        for n, norm in enumerate(norms):
            means, variances = (torch.stack([row[n][i] for row in rows]) for i in range(2))
            norm.level_mean, norm.level_var = means, variances
            norm.running_mean.copy_(means[-1])  # type: ignore[union-attr]
            norm.running_var.copy_(variances[-1])  # type: ignore[union-attr]


def _statistics(
    model: nn.Module, norms: list[RoutedBatchNorm2d], loader: Iterable[Any], level: int, progress: bool
) -> list[tuple[Tensor, Tensor]]:
    """The mean and variance of each norm over the loader with all blocks at a level."""
    from tqdm import tqdm

    blocks, device = len(carrier_of(model).shared.blocks), norms[0].running_mean.device  # type: ignore[union-attr]
    for norm in norms:
        norm.reset_running_stats()
    batches = 0
    for batch in tqdm(loader, f"level {level}", disable=not progress, leave=False):
        x = (batch[0] if isinstance(batch, (tuple, list)) else batch).to(device)
        with levels(model, torch.full((len(x), blocks), level, device=device)):
            model(x)
        batches += 1
    if batches == 0:
        raise ValueError(f"{_OP}: loader must give a batch each time that it is run through, got none at level {level}")
    return [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]  # type: ignore[union-attr]


@contextmanager
def _counting(norms: list[RoutedBatchNorm2d]) -> Iterator[None]:
    """Inside the context the norms take the mean over batches; they are as before at the end."""
    before = [
        (norm, norm.momentum, {k: v.clone() for k, v in norm._buffers.items() if v is not None}) for norm in norms
    ]
    try:
        for norm in norms:
            norm.momentum = None
            norm.training = True
        yield
    finally:
        for norm, momentum, buffers in before:
            norm.momentum, norm.training = momentum, False
            for name, value in buffers.items():
                norm._buffers[name].copy_(value)  # type: ignore[union-attr]
