"""The experiments of the paper by name (Table 1 and section 4.1), as settings of a run."""

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from den.support.limits import Range, check_ranges
from den.support.settings import flattened, to_dict
from den.train.config import (
    DataConfig,
    EstimatorTraining,
    MethodConfig,
    NetworkConfig,
    PhaseConfig,
    SelectorTraining,
    TrainConfig,
)


@dataclass(frozen=True)
class Scenario:
    """Tasks, backbones and batch size of a scenario."""

    tasks: tuple[str, ...]
    backbones: tuple[str, ...]  # the paper's; the first is the default
    batch_size: int = 128  # images in a batch
    each: bool = False  # of every task as many
    nested: tuple[int, ...] = ()  # levels that NestedNet and PackNet* give these tasks


SCENARIOS = {
    "m1": Scenario(("cifar100", "tinyimagenet", "stl10"), ("wrn32_4", "resnet42"), each=True, nested=(2, 1, 3)),
    "m2": Scenario(("imagenet50-0..9@84",), ("simpleconvnet",), batch_size=256),
    "m3": Scenario(("cifar100-coarse", "cifar100"), ("wrn32_4",)),
    "c1": Scenario(("cifar100",), ("resnext29_8x64d_narrow", "resnext29_4x64d_narrow", "vgg19_elastic_fc")),
}
# The networks whose parameters the paper counts: 22.4M and 11.2M for its ResNeXt-29, 38.9M for its "VGG-16".
LEVELS = {
    "vgg19_elastic_fc": 3,
    "vgg19": 3,
    "resnext29_8x64d_narrow": 4,
    "resnext29_4x64d_narrow": 3,
    "resnext29_2x64d_narrow": 3,
    "simpleconvnet": 2,
    "simpleconvnet_elastic_fc": 2,
    "simpleconvnet_strided": 2,
}
TRUNK_SIZE = 32  # the stems' strides bring 32, 64 and 96 pixels to it
IMAGE_SIZE = 84  # of a backbone without stems, where the tasks do not say
RANGE = re.compile(r"(.+-)(\d+)\.\.(\d+)(@\d+)?")


@dataclass(frozen=True)
class ScenarioOptions:
    """The few choices that a scenario is made of; all that follows from them can be changed one by one."""

    backbone: str | None = None
    """Name of the backbone, which the number of levels follows; None: the paper's first."""
    rho: float = 0.1
    """Weight of the sparsity term S(z) (equation 5): larger means fewer FLOPs."""
    budget: Annotated[float, Range(0, open_low=True)] = 1.0
    """Share of the full schedule: every phase has that share of its updates, and its rate falls that much sooner."""
    tasks: tuple[str, ...] = ()
    """Image sets, one task each, instead of the paper's; tin50-0..9 stands for tin50-0 to tin50-9."""
    paper: bool = False
    """The letter of the paper where the authors' code differs: the selector's rate 1e-5, no baseline and no entropy
    bonus, structures drawn, phases until convergence, Xavier's initialisation, the paper's selector, nothing held
    out."""
    quick: bool = False
    """A small network (wrn14_1 on maps of 16x16) and a short schedule, some minutes on a CPU: for a first look at your
    own images.  It says nothing about the paper."""


def scenario_config(name: str, options: ScenarioOptions | None = None) -> TrainConfig:
    """The settings of scenario `name`.

    The full schedule is that of the authors' code: 78,200 updates of the estimator on equation 8 (rate 0.1, divided by
    10 after a half and three quarters), then ten stages of 4,693 updates of the selector, with 15,642 of the estimator
    on the likeliest structures between them (rate 0.1, divided by 10 at our stages 5 and 8, which it counts 3 and 6).
    Its step is an update on 128 images of each task in turn; ours is one update on as many images together.

    Raises ValueError for an unknown name, with those that there are, a budget that is not above 0, a rho below 0.
    """
    if name not in SCENARIOS:
        raise ValueError(f"den train: scenario must be one of {', '.join(SCENARIOS)}, got {name!r}")
    options, scenario = options or ScenarioOptions(), SCENARIOS[name]
    check_ranges(options, "den train")
    if options.quick:
        return _quick(name, options)
    backbone = options.backbone or scenario.backbones[0]
    tasks = expand_tasks(options.tasks or scenario.tasks)
    return TrainConfig(
        out=Path("runs") / name,
        scenario=name,
        stages=10,
        data=DataConfig(
            tasks=tasks,
            batch_size=scenario.batch_size * (len(tasks) if scenario.each else 1),
            joint=name == "m3",
            validation=0.0 if options.paper else 0.05,
        ),
        network=NetworkConfig(
            backbone=backbone,
            levels=LEVELS.get(backbone, 4),
            trunk_size=_trunk_size(backbone, tasks),
            start="xavier" if options.paper else "he",
            selector="paper" if options.paper else "small",
            selector_head="shared" if name in ("m1", "m3") else "own",
            selector_start="xavier" if options.paper else "near-uniform",
        ),
        estimator=_estimator(options),
        selector=_selector(options),
        methods=MethodConfig(updates="estimator", levels=scenario.nested if tasks == scenario.tasks else ()),
    )


def _quick(name: str, options: ScenarioOptions) -> TrainConfig:
    """Settings of a first look: two stages, as long as a selector needs to decide."""
    backbone, steps = options.backbone or "wrn14_1", partial(_steps, budget=options.budget)
    return TrainConfig(
        out=Path("runs") / name,
        scenario=name,
        stages=2,
        data=DataConfig(expand_tasks(options.tasks or SCENARIOS[name].tasks), batch_size=64, joint=name == "m3"),
        network=NetworkConfig(backbone=backbone, levels=LEVELS.get(backbone, 4), trunk_size=16),
        estimator=EstimatorTraining(
            first=PhaseConfig(steps(600), 0.1), later=PhaseConfig(steps(300), 0.03), weight_decay=5e-4
        ),
        selector=SelectorTraining(phase=PhaseConfig(steps(250), 3e-3), rho=options.rho),
    )


def _estimator(options: ScenarioOptions) -> EstimatorTraining:
    until: Literal["steps", "converge"] = "converge" if options.paper else "steps"
    later = PhaseConfig(_steps(15_642, options.budget), 0.1, "constant", until)
    return EstimatorTraining(
        first=PhaseConfig(_steps(78_200, options.budget), 0.1, "constant" if options.paper else "step", until),
        later=later,
        finish=replace(later, steps=0),
        decay=0.1,
        decay_at=() if options.paper else (5, 8),
        structures="sample" if options.paper else "argmax",
        initial_share=0.0 if options.paper else 0.3,
    )


def _selector(options: ScenarioOptions) -> SelectorTraining:
    """Settings of the selector's training, with exploration falling the faster, the smaller the budget."""
    steps = _steps(4_693, options.budget)
    common = SelectorTraining(
        phase=PhaseConfig(steps, 1e-3, "constant"),
        decay=0.1,
        decay_at=(4, 7),
        rho=options.rho,
        exploration=0.99 ** (1 / options.budget),
    )
    if not options.paper:
        return common
    phase = PhaseConfig(steps, 1e-5, "constant", "converge")
    return replace(common, phase=phase, decay_at=(), baseline="none", entropy_bonus=0.0)


def changes(name: str, options: ScenarioOptions, settings: TrainConfig) -> dict[str, tuple[object, object]]:
    """Settings of a run that differ from the scenario's own on its full schedule, which is that of the authors' code
    or, with `options.paper`, the text's: by name, the run's and the scenario's.

    The tasks, the backbone and what follows from them are the run's own.
    """
    own = replace(options, budget=1.0, quick=False)
    theirs = flattened(
        to_dict(scenario_config(name, replace(own, backbone=settings.network.backbone, tasks=settings.data.tasks)))
    )
    ours = flattened(to_dict(settings))
    parts = ("stages", "estimator.", "selector.", "network.", "data.")
    left_out = ("data.root", "data.tasks", "network.backbone", "selector.rho")
    return {
        key: (ours[key], value)
        for key, value in theirs.items()
        if key.startswith(parts) and key not in left_out and ours[key] != value
    }


def _steps(full: int, budget: float) -> int:
    """Number of updates within the budget, from 1 to 10^15.

    >>> [_steps(4_693, budget) for budget in (1, 0.1, 1e-6)]
    [4693, 469, 1]
    """
    return max(1, round(min(full * budget, 1e15)))


def _trunk_size(backbone: str, tasks: tuple[str, ...]) -> int:
    """Side of the trunk's maps; of SimpleConvNet, which has no stems, that of the largest images."""
    if not backbone.startswith("simpleconvnet"):
        return TRUNK_SIZE
    return max(int(size) if size else IMAGE_SIZE for _, _, size in (task.partition("@") for task in tasks))


def expand_tasks(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of tasks with ranges written out.

    >>> expand_tasks(("digits", "tin50-0..1@32"))
    ('digits', 'tin50-0@32', 'tin50-1@32')
    """
    tasks: list[str] = []
    for name in names:
        if not (found := RANGE.fullmatch(name)):
            tasks.append(name)
            continue
        stem, first, last, size = found.groups(default="")
        tasks += [f"{stem}{number}{size}" for number in range(int(first), int(last) + 1)]
    return tuple(tasks)
