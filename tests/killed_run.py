"""A program: trains a tiny run of each kind, den and dag, in a folder of its name under argv[1], killed (SIGKILL) at
random moments and continued, until it ends; prints for each how many times it was killed.  Processes are forked: each
costs no imports."""

import dataclasses
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # which an optimiser imports at its first step
import torch.utils.tensorboard

import den.recipes.dag.recipe
import den.train.engine
from den.dag.config import DagDataConfig, DagNetworkConfig, DagTrainConfig, DagTraining
from den.data import load_set
from den.recipes.dag.search import train as train_dag
from den.recipes.den import train
from den.train.config import DataConfig, EstimatorTraining, NetworkConfig, PhaseConfig, SelectorTraining, TrainConfig

DIGITS = load_set("digits", "train").subset(torch.arange(80))


def den_config(out: Path) -> TrainConfig:
    return TrainConfig(
        out=out, stages=1, epoch_steps=2, progress=False,
        data=DataConfig(tasks=("digits",), batch_size=10, validation=0.2),
        network=NetworkConfig(backbone="wrn8_1", trunk_size=8),
        estimator=EstimatorTraining(first=PhaseConfig(6, 0.05), finish=PhaseConfig(4, 0.01)),
        selector=SelectorTraining(phase=PhaseConfig(6, 1e-3)),
    )  # fmt: skip


def dag_config(out: Path) -> DagTrainConfig:
    return DagTrainConfig(
        out=out, epoch_steps=1, progress=False, data=DagDataConfig(batch_size=12),
        network=DagNetworkConfig(states=4, flow=2, channels=8, trunk_size=4),
        training=DagTraining(steps=12, shares=(0.2, 0.5, 0.3)),
    )  # fmt: skip


def two_tasks(data: object, split: str) -> list:
    """Digits below five, and the others."""
    found = []
    for name, first in (("low", 0), ("high", 5)):
        part = DIGITS.subset(((DIGITS.labels >= first) & (DIGITS.labels < first + 5)).nonzero().flatten())
        found.append(dataclasses.replace(part, name=name, labels=part.labels - first, classes=5))
    return found


KINDS = {"den": (train, den_config), "dag": (train_dag, dag_config)}


def run(kind: str, out: Path) -> None:
    """Train, or continue, in this process."""
    den.recipes.setup.load_set = lambda name, split, root: DIGITS
    den.recipes.dag.recipe.load_tasks = two_tasks
    trains, config = KINDS[kind]
    last, best = out / "last.safetensors", out / "best.safetensors"
    if best.exists() and not last.exists():  # killed between the two of the first checkpoint: what the refusal says
        shutil.copy(best, last)
    trains(config(out), resume=last.exists())


def run_killed(kind: str, out: Path) -> int:
    """The same in processes that are killed, each after 0 to 2 checkpoints and a moment; how many there were."""
    moments = random.Random(kind)
    for killed in range(1000):
        if not (pid := os.fork()):
            run(kind, out)
            os._exit(0)
        saves = moments.choice((0, 1, 2))
        ended = wait_for_saves(out / "last.safetensors", saves, pid)
        if not ended:
            time.sleep(moments.uniform(0, 0.03 if saves else 0.3))
            os.kill(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)[1] == 0
        if ended:
            return killed
    raise RuntimeError("the run never ended")


def wait_for_saves(path: Path, count: int, pid: int) -> bool:
    """Wait until a file has been replaced `count` times, or its process has ended: whether it has."""
    seen = path.stat().st_mtime_ns if path.exists() else 0
    while count:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            if status:
                raise RuntimeError(f"the run ended with status {status}")
            return True
        if path.exists() and path.stat().st_mtime_ns != seen:
            seen, count = path.stat().st_mtime_ns, count - 1
        time.sleep(0.001)
    return False


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads would not survive the fork
    for kind in KINDS:
        print(run_killed(kind, Path(sys.argv[1]) / kind))
