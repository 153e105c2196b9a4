"""Worth of choosing per image: against the best single structure of the same cost, and where the network spends."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from den.data import ImageSet
from den.evaluate.accuracy import BATCH, TaskReport, best_static
from den.nn.count import count_flops
from den.nn.model import DeepElasticNetwork
from den.runs.evaluation import Static, TaskResult
from den.runs.trained import Run, open_run

MOST_USED = 20  # structures in use that are tried as single ones, too


def best_single(
    run: Run, image_set: ImageSet, report: TaskReport, candidates: int, held_out: ImageSet | None
) -> Static:
    """The best of many single structures that cost about what the report's do, for all images of a set.

    held_out: images that it is chosen on, by accuracy; None: on the set itself, which flatters the single structure.
    """
    found = best_static(
        run.model, image_set, report.flops, extra=report.common[0][:MOST_USED], choose_on=held_out,
        candidates=candidates,
    )  # fmt: skip
    levels = "".join(map(str, found.structure.tolist()))
    best = found.report
    return Static(levels, found.candidates, best.accuracy, best.flops_ratio, held_out is not None)


@torch.inference_mode()
def image_losses(model: DeepElasticNetwork, image_set: ImageSet) -> Tensor:
    """Cross-entropy of every image of a set at the full structure: float32 [n], on the CPU; evaluation mode."""
    device, losses = next(model.parameters()).device, []
    for start in range(0, len(image_set), BATCH):
        part = slice(start, start + BATCH)
        logits = model.estimator(image_set.inputs(part).to(device), image_set.name)
        losses.append(F.cross_entropy(logits.float().cpu(), image_set.labels[part].cpu(), reduction="none"))
    return torch.cat(losses)


def cost_correlation(model: DeepElasticNetwork, levels: Tensor, losses: Tensor) -> float | None:
    """Rank correlation (Spearman) of what images cost with the losses of another network, both [n].

    Positive where images that are hard cost more. None: all images cost the same.

    levels: int64 [n, N], the images' structures.
    """
    flops = count_flops(model, levels).cpu()
    if (flops == flops[0]).all():
        return None
    return float(spearmanr(flops, losses).statistic)


def open_dense(folder: Path, runs: Sequence[Run]) -> Run:
    """The dense run of a folder, which must have learnt all tasks of `runs`; ValueError for another."""
    dense = open_run(folder)
    tasks = dict.fromkeys(task for run in runs for task in run.config.data.tasks)
    if dense.config.mode != "dense" or not set(tasks) <= set(dense.config.data.tasks):
        raise ValueError(
            f"evaluate: dense must be a dense run of {', '.join(tasks)}, got mode {dense.config.mode!r}, tasks"
            f" {', '.join(dense.config.data.tasks)} ({folder})"
        )
    return dense


def with_gain(
    run: Run,
    sets: Sequence[ImageSet],
    held_out: Sequence[ImageSet],
    results: Sequence[TaskResult],
    reports: Mapping[str, TaskReport],
    candidates: int,
    dense: Run | None,
) -> tuple[TaskResult, ...]:
    """Results of a run on its sets with the best of `candidates` single structures (0: without), chosen on `held_out`.

    dense: with it also the correlation of what images cost with its losses.
    """
    held, found = {each.name: each for each in held_out}, []
    for image_set, result in zip(sets, results, strict=True):
        report, static, correlation = reports[image_set.name], None, None
        if candidates:
            static = best_single(run, image_set, report, candidates, held.get(image_set.name))
        if dense is not None:
            model = dense.model.to(next(run.model.parameters()).device)
            correlation = cost_correlation(run.model, report.levels, image_losses(model, image_set))
        found.append(dataclasses.replace(result, static=static, cost_correlation=correlation))
    return tuple(found)
