"""Training on tasks of a user's own, given as a dictionary and data loaders."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from den.dag.config import DagDataConfig, DagTrainConfig
from den.dag.evaluate import TaskResult, evaluate_tasks
from den.dag.own import OwnTask, own_tasks
from den.data.loaders import LoaderBatches, Loaders, LoaderSet, halves, loader_sets
from den.recipes.dag.recipe import Network, TaskData
from den.recipes.dag.search import train as search


@dataclass(frozen=True, eq=False)
class Fitted:
    """Trained network, in evaluation mode, its results on the test loaders by task, and its run folder."""

    model: Network
    results: dict[str, TaskResult]
    folder: Path


def fit(
    tasks: Mapping[str, OwnTask],
    train: Loaders,
    test: Loaders | None = None,
    config: DagTrainConfig | None = None,
    *,
    resume: bool = False,
) -> Fitted:
    """Search a topology for each task, reduce, fine-tune: `den dag train` on data loaders.

    Args:
        tasks: by name.
        train: one loader of ``(images, {task: targets})``, for tasks of the same images, or a loader of ``(images,
            targets)`` for each task; images float [B, C, H, W], normalised, of one size a task.  While weights and
            gates learn in turn (`training.search`, by default), each gets a half of every data set, shuffled, with the
            loader's batch size, workers and `collate_fn`.
        test: the same for measuring, after every epoch and at the end; None: nothing is measured.
        config: all other settings; its `out` is the run folder.  What concerns the data does not count, `loss_weights`
            are those of the tasks unless given.
        resume: continue the run of the folder, exactly where the loaders' data sets give the same again.

    Raises ValueError for tasks, loaders, targets and settings that do not fit.
    """
    if not tasks:
        raise ValueError("fit: tasks must be at least one, got none")
    config = DagTrainConfig() if config is None else config
    weights = config.training.loss_weights or tuple(own.weight for own in tasks.values())
    config = dataclasses.replace(
        config,
        data=DagDataConfig("own", only=tuple(tasks)),
        training=dataclasses.replace(config.training, loss_weights=weights),
    )
    known = own_tasks(tasks, _shapes(tasks, train))
    searched = config.mode == "adashare" or (config.mode == "dag" and config.training.search == "alternating")
    tests: list[LoaderSet] = []

    def data(config: DagTrainConfig, device: torch.device) -> TaskData:
        sets = loader_sets(train, known, device)
        tests.extend(loader_sets(test, known, device) if test is not None else [])
        parts = {"all": sets}
        if searched:
            pairs = [halves(each, config.seed) for each in sets]
            parts |= {"weights": [first for first, _ in pairs], "gates": [second for _, second in pairs]}
        batches = {name: LoaderBatches(part, config.seed + n) for n, (name, part) in enumerate(parts.items())}
        return TaskData(list(known), batches, [*tests], {})

    model = search(config, resume=resume, data=data)
    return Fitted(model, evaluate_tasks(model, tests), Path(config.out))


def _shapes(tasks: Mapping[str, OwnTask], loaders: Loaders) -> dict[str, tuple[int, int, int]]:
    """Channels, height and width of each task's images, by the first batch of its loader."""
    if isinstance(loaders, DataLoader):
        return dict.fromkeys(tasks, _first_shape(loaders, ", ".join(tasks)))
    if missing := [name for name in tasks if name not in loaders]:
        raise ValueError(f"fit: train must have a loader for {missing[0]!r}, got {', '.join(loaders) or 'none'}")
    return {name: _first_shape(loaders[name], name) for name in tasks}


def _first_shape(loader: DataLoader, name: str) -> tuple[int, int, int]:
    for values in loader:
        images = values[0] if isinstance(values, tuple | list) and values else values
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"fit: images of {name} must be float [B, C, H, W], got {got}")
        _, channels, height, width = images.shape
        return channels, height, width
    raise ValueError(f"fit: loader of {name} must give at least one batch, got none")
