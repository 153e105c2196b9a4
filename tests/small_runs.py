"""Runs of a second: two tasks, three blocks, a few images."""

import dataclasses
from functools import cache

import pytest
import torch

from den.data import load_set
from den.recipes.den import train
from den.runs.command import SetsOfRuns, look_up, measured
from den.train.config import DataConfig, EstimatorTraining, MethodConfig, NetworkConfig, PhaseConfig, SelectorTraining
from den.train.config import TrainConfig as Config
from den.train.engine import Engine


def small_config(out, mode, **changes) -> Config:
    config = Config(
        out=out,
        mode=mode,
        epoch_steps=3,
        progress=False,
        data=DataConfig(tasks=("fashion", "digits"), batch_size=10),
        network=NetworkConfig(backbone="wrn8_1", trunk_size=8),
        estimator=EstimatorTraining(
            first=PhaseConfig(steps=5, rate=0.05),
            later=PhaseConfig(steps=4, rate=0.02),
            finish=PhaseConfig(steps=3, rate=0.01),
        ),
        selector=SelectorTraining(phase=PhaseConfig(steps=6, rate=1e-2)),
        methods=MethodConfig(share_rounds=2),
    )
    return dataclasses.replace(config, **changes)


def alternating_config(out, **changes) -> Config:
    """Two stages of Algorithm 1: 4 updates of the estimator and 5 of the selector, 3 and 5, and 2 of the finish."""
    config = Config(
        out=out,
        stages=2,
        epoch_steps=3,
        progress=False,
        data=DataConfig(tasks=("fashion", "digits"), batch_size=10),
        network=NetworkConfig(backbone="wrn8_1", trunk_size=8),
        estimator=EstimatorTraining(
            first=PhaseConfig(steps=4, rate=0.05), later=PhaseConfig(steps=3, rate=0.02), finish=PhaseConfig(2, 0.01)
        ),
        selector=SelectorTraining(phase=PhaseConfig(steps=5, rate=1e-3), samples=3),
    )
    return dataclasses.replace(config, **changes)


@cache
def few_images(name, split, count):
    """The first images of a packaged set."""
    return load_set(name, split).subset(torch.arange(count))


def cut_sets(monkeypatch, images=60):
    """The packaged sets cut to a few images, so that a run costs its steps only."""
    monkeypatch.setattr("den.recipes.setup.load_set", lambda name, split, root: few_images(name, split, images))


def digit_tasks(split, kinds, count):
    """A task for each name of `kinds`, {name: consecutive digits}: the first `count` of the packaged images of them."""
    whole, found = load_set("digits", split), []
    for name, digits in kinds.items():
        part = whole.subset(torch.isin(whole.labels, torch.tensor(digits)).nonzero().flatten()[:count])
        found.append(dataclasses.replace(part, name=name, labels=part.labels - digits[0], classes=len(digits)))
    return found


def use_dag_tasks(monkeypatch, load):
    """Let `den dag train` and its report read tasks with load(data, split, root) instead of those of a scenario."""
    for module in ("recipes.dag.recipe", "report.dag.measured"):
        monkeypatch.setattr(f"den.{module}.load_tasks", load)


def assert_same_weights(one, other):
    """Bit for bit."""
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def evaluations(folder):
    """The record of a run, measured where it has none, and those of its operating points."""
    return measured(look_up(folder), SetsOfRuns(None))


def train_interrupted(config, monkeypatch, at, run=train):
    """Train by `run` until update `at` (from 0), which does not happen."""
    plain, calls = Engine.update, []

    def update(self, objective):
        calls.append(None)
        if len(calls) > at:
            raise KeyboardInterrupt
        plain(self, objective)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "update", update)
        with pytest.raises(KeyboardInterrupt):
            run(config)
