"""A program: trains tiny runs in folder argv[1], one after the other, in one of several processes or alone.

The runs that argv[2:] names are those of `RUNS`.  What processes it shares them with is in the environment, as torchrun
has it.  `main` may be called in a test's own process, too.
"""

import dataclasses
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

from den.dag.config import DagDataConfig, DagNetworkConfig, DagTrainConfig, DagTraining, ReductionConfig
from den.dag.scenarios import load_tasks as load_files
from den.data import load_set
from den.recipes.dag.search import train as search
from den.recipes.den import train
from den.train.config import (
    DataConfig,
    EstimatorTraining,
    MethodConfig,
    NetworkConfig,
    PhaseConfig,
    SelectorTraining,
    TrainConfig,
)


def den(folder: Path, mode: str = "den", **changes) -> TrainConfig:
    """Two tasks, 4 and 3 images in a batch, three blocks."""
    phase, later = PhaseConfig(2, 0.02), PhaseConfig(2, 0.01)
    config = TrainConfig(
        out=folder / mode, mode=mode, stages=1, epoch_steps=2, progress=False, device="cpu",
        data=DataConfig(tasks=("fashion", "digits"), batch_size=7, validation=0.2),
        network=NetworkConfig(backbone="wrn8_1", trunk_size=8),
        estimator=EstimatorTraining(first=phase, later=later, finish=later, tau=0.2),
        selector=SelectorTraining(phase=PhaseConfig(2, 1e-2)), methods=MethodConfig(share_rounds=1),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def steered(folder: Path) -> TrainConfig:
    """Two stages, rho steered to a budget, a running mean as the baseline."""
    selector = SelectorTraining(phase=PhaseConfig(2, 1e-2), budget=0.5, baseline="running-mean")
    return den(folder, stages=2, out=folder / "steered", selector=selector)


def lone(folder: Path) -> TrainConfig:
    """A batch of one image each: a process has no image of one of the tasks."""
    return den(folder, out=folder / "lone", data=DataConfig(tasks=("fashion", "digits"), batch_size=2, validation=0.2))


def dag(folder: Path, mode: str = "dag", **changes) -> DagTrainConfig:
    """Two tasks of 5 and 4 images in a batch."""
    config = DagTrainConfig(
        out=folder / f"dag-{mode}", mode=mode, epoch_steps=2, progress=False, device="cpu",
        data=DagDataConfig(batch_size=9, validation=0.3),
        network=DagNetworkConfig(states=4, flow=2, channels=4, trunk_size=4),
        training=DagTraining(steps=6, shares=(0.3, 0.4, 0.3), rate=0.02, fine_rate=0.02),
        reduction=ReductionConfig(ranking="random", norm_batches=2),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def dense(folder: Path) -> DagTrainConfig:
    """Three dense tasks of the same 3 scenes, which a process reads ahead; `write_npy_scenes` has written them."""
    data = DagDataConfig("nyuv2", folder.parent / "scenes", batch_size=3, classes=13, validation=0.3, workers=1)
    return dag(folder, out=folder / "dag-dense", data=data)


RUNS = {
    "den": den, "steered": steered, "lone": lone, "dag": dag, "dag-dense": dense,
    **{mode: lambda folder, mode=mode: den(folder, mode) for mode in
       ("dense", "random", "nestednet", "packnet", "routing", "cross-stitch", "blockdrop", "adashare")},
    **{f"dag-{mode}": lambda folder, mode=mode: dag(folder, mode) for mode in
       ("hard", "single", "adashare", "cross-stitch")},
}  # fmt: skip


def main(out: Path, names: list[str], **changes) -> None:
    """Train the runs of these names in folders of theirs in `out`, their settings changed."""
    whole = {(name, split): load_set(name, split) for name in ("digits", "fashion") for split in ("train", "test")}

    def tasks(data: DagDataConfig, split: str, root: Path | None = None) -> list:
        """Two tasks of different classes out of the digits; dense ones come from files."""
        if data.scenario == "nyuv2":
            return load_files(data, split, root)
        digits, found = whole["digits", split], []
        for name, kinds in (("low", (0, 1, 2)), ("high", (7, 8, 9))):
            part = digits.subset(torch.isin(digits.labels, torch.tensor(kinds)).nonzero().flatten()[:30])
            found.append(dataclasses.replace(part, name=name, labels=part.labels - kinds[0], classes=3))
        return found

    with ExitStack() as stack:
        few = torch.arange(60)
        cut = lambda name, split, root: whole[name, split].subset(few)  # noqa: E731
        stack.enter_context(mock.patch("den.recipes.setup.load_set", cut))
        stack.enter_context(mock.patch("den.recipes.dag.recipe.load_tasks", tasks))
        for name in names:
            config = dataclasses.replace(RUNS[name](out), **changes)
            (search if isinstance(config, DagTrainConfig) else train)(config)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
