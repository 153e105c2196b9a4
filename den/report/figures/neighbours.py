"""Images that a selector takes for alike (figure 3 of the paper)."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from den.data import ImageSet
from den.report.figures.style import INK, headline, image_strip, styled

NEAREST = 4


def nearest_images(query: Tensor, distributions: Sequence[Tensor], count: int = NEAREST) -> list[tuple[Tensor, Tensor]]:
    """The images of each task whose distributions are nearest to the query's by L2 distance, nearest first.

    Args:
        query: [N, L], a selector's distribution of one image.
        distributions: [n, N, L] of each task's images.

    Returns:
        Positions int64 [count] and distances [count] for each task; the query itself (distance 0) is the caller's to
        leave out.
    """
    found = []
    for chances in distributions:
        distance = (chances - query).flatten(1).norm(dim=1)
        found.append(tuple(reversed(distance.topk(min(count, len(distance)), largest=False))))
    return found


@styled
def neighbours(sets: Sequence[ImageSet], distributions: Sequence[Tensor], seed: int = 0) -> Figure:
    """A query of each task and the nearest images of all tasks by the selector's distribution.

    distributions: float [n, N, L] of each set's images.
    """
    generator = torch.Generator().manual_seed(seed)
    figure = Figure(figsize=(2.6 + 3.0 * len(sets), 1.15 * len(sets) + 0.7), layout="constrained")
    panels = figure.subplots(len(sets), 1 + len(sets), squeeze=False, width_ratios=[1, *[NEAREST] * len(sets)])
    same, total = 0, 0
    for k, image_set in enumerate(sets):
        index = int(torch.randint(len(image_set), (1,), generator=generator))
        others = [_without(chances, index if j == k else None) for j, chances in enumerate(distributions)]
        found = nearest_images(distributions[k][index], others)
        _show(panels[k][0], image_set.images[index][None], image_set.name)
        for j, (positions, distances) in enumerate(found):
            title = f"nearest of {sets[j].name}, L2 {distances[0]:.2f} to {distances[-1]:.2f}"
            _show(panels[k][1 + j], sets[j].images[positions], title)
        labels = sets[k].labels[found[k][0]]
        same, total = same + int((labels == image_set.labels[index]).sum()), total + len(labels)
    headline(
        figure,
        f"Nearest to the left image by the selector's distribution: {same} of {total} of its own task share its class",
    )
    return figure


def _without(chances: Tensor, index: int | None) -> Tensor:
    """The distributions [n, N, L] with that at `index`, the query's own, at infinity, so that it is never nearest."""
    if index is None:
        return chances
    changed = chances.clone()
    changed[index] = torch.inf
    return changed


def _show(axes: Axes, images: Tensor, title: str) -> None:  # [n, c, S, S]
    axes.imshow(image_strip(images), aspect="equal")
    axes.set_title(title, fontsize=9, color=INK)
    axes.set_axis_off()
