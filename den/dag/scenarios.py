"""The sets of tasks that `den dag` trains on, and the settings that suit each."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from den.dag.config import DagDataConfig, DagNetworkConfig, DagTrainConfig, DagTraining, ReductionConfig, Scenario
from den.dag.own_sets import load_own_sets
from den.data import cityscapes, nyuv2, pascal_context
from den.data.images import ImageSet
from den.data.omniglot import load_omniglot
from den.data.scenes import SceneSet
from den.data.sets import load_set
from den.nn.tasks import Task

SINGLE_TASK = {"nyuv2": nyuv2.single_task, "cityscapes": cityscapes.single_task}  # published metrics of a task
LOSS_WEIGHTS = {  # of the public protocols, by scenario and task
    "nyuv2": nyuv2.LOSS_WEIGHTS,
    "cityscapes": cityscapes.LOSS_WEIGHTS,
    "pascal": pascal_context.LOSS_WEIGHTS,
}
# By default searches are short: gates that learn fast enough to differ, and most updates on what is left, with all
# training images (docs/results/dag-omniglot-settings.md).
_SHORT = DagTraining(steps=1200)
_DENSE = DagTrainConfig(
    network=DagNetworkConfig(channels=64),
    # 10,000 updates of the gates: at a tenth of the rate they go further than on Omniglot at 0.1.  Neither the rate nor
    # the graph was chosen on these sets, which nobody has run this library on yet (docs/results/dag-dense-settings.md).
    training=DagTraining(steps=20_000, shares=(0.2, 0.5, 0.3), rate=0.01, fine_rate=0.01, gate_rate=0.01),
    reduction=ReductionConfig(norm_batches=100),
)


def _dense(scenario: Scenario, batch_size: int) -> DagTrainConfig:
    weights = tuple(LOSS_WEIGHTS[scenario].values())
    training = dataclasses.replace(_DENSE.training, loss_weights=weights)
    return dataclasses.replace(_DENSE, data=DagDataConfig(scenario, batch_size=batch_size), training=training)


SCENARIOS: dict[str, DagTrainConfig] = {
    "dag-omniglot": DagTrainConfig(network=DagNetworkConfig(channels=24, trunk_size=7), training=_SHORT),
    "dag-cifar100": DagTrainConfig(
        data=DagDataConfig("cifar100", batch_size=160),
        network=DagNetworkConfig(trunk_size=16),
        training=dataclasses.replace(_SHORT, steps=8000),
    ),
    "dag-nyuv2": _dense("nyuv2", batch_size=8),
    "dag-cityscapes": _dense("cityscapes", batch_size=8),
    "dag-pascal": _dense("pascal", batch_size=6),
}


def loss_weights(config: DagTrainConfig, tasks: Sequence[Task]) -> tuple[float, ...]:
    """Weights of the tasks' losses, one for each; 1 each where the settings give none.

    Where only some of a scenario's tasks are trained, weights may be given for all of them; the others' are left out.

    Raises ValueError for another number of weights.
    """
    given, names = config.training.loss_weights, tuple(LOSS_WEIGHTS.get(config.data.scenario, {}))
    if not given:
        return (1.0,) * len(tasks)
    if config.data.only and len(given) == len(names):
        by_name = dict(zip(names, given, strict=True))
        return tuple(by_name[task.name] for task in tasks)
    if len(given) != len(tasks):
        raise ValueError(f"config: training.loss_weights must be one for each of {len(tasks)} tasks, got {list(given)}")
    return given


def named_settings(name: str) -> DagTrainConfig:
    """The settings of a scenario by its name on the command line; ValueError for an unknown one."""
    if name == "dag-own":
        return DagTrainConfig(data=DagDataConfig("own"))
    if name not in SCENARIOS:
        raise ValueError(f"den dag train: scenario must be one of {', '.join(SCENARIOS)}, got {name}")
    return SCENARIOS[name]


def load_tasks(data: DagDataConfig, split: str, root: Path | None = None) -> list[ImageSet | SceneSet]:
    """The sets of the scenario, one per task or one for tasks of the same images; `root` replaces that of the settings.

    split: "train" or "test", and "validation" where `has_validation` says so.

    Raises ValueError for data that are missing or damaged, and for a task that they lack or have no target of.
    """
    sets = _load(data, split, root or data.root)
    names = [task.name for each in sets for task in each.tasks]
    if missing := [name for name in data.only if name not in names]:
        raise ValueError(f"config: data.only must be among {', '.join(names)}, got {', '.join(missing)}")
    if data.only:
        sets = [each.only(data.only) for each in sets if any(task.name in data.only for task in each.tasks)]
    for each in sets:
        if isinstance(each, SceneSet):
            each.check_targets()
    return sets


def has_validation(data: DagDataConfig) -> bool:
    """True where the scenario has a validation split of its own."""
    return data.scenario == "omniglot" and data.protocol == "mtl20"


def _load(data: DagDataConfig, split: str, root: Path | None) -> list[ImageSet | SceneSet]:
    if data.scenario == "own":
        return load_own_sets(data, split, root)
    if data.scenario == "omniglot":
        return [*load_omniglot(root, split, data.size, data.protocol)]
    if data.scenario == "nyuv2":
        return [nyuv2.load_nyuv2(root, split, data.classes)]
    if data.scenario == "cityscapes":
        return [cityscapes.load_cityscapes(root, split, data.classes)]
    if data.scenario == "pascal":
        return [pascal_context.load_pascal_context(root, split, data.size or 512)]
    sets = by_coarse_label(load_set("cifar100", split, root), load_set("cifar100-coarse", split, root).labels)
    if [each.classes for each in sets] != [
        5
    ] * 20:  # numbered by rank, a class that lacks images would shift the others
        got = ", ".join(f"{each.classes} in {each.name}" for each in sets if each.classes != 5)
        raise ValueError(
            f"load_set: cifar100 {split} in {root} must have 20 coarse labels of 5 classes, got {got or len(sets)}"
        )
    return [*sets]


def by_coarse_label(fine: ImageSet, coarse: Tensor) -> list[ImageSet]:
    """A set per coarse label (int64 [N]) of `fine`, its classes the fine labels under it, numbered from 0 by rank."""
    sets = []
    for label in coarse.unique().tolist():
        member = (coarse == label).nonzero().flatten()
        kinds, numbered = fine.labels[member].unique(return_inverse=True)
        sets.append(
            dataclasses.replace(fine.subset(member), name=f"coarse{label}", labels=numbered, classes=len(kinds))
        )
    return sets
