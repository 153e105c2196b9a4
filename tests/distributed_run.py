"""A program: two processes train the tiny runs `RUNS` in folder argv[1].

They are told what torchrun would tell them, and started anew as it does where one of them fails.  They are forked, so
that each costs no imports.
"""

import dataclasses
import hashlib
import os
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
import torch.utils.tensorboard

from den.dag.config import DagDataConfig, DagNetworkConfig, DagTrainConfig, DagTraining, ReductionConfig
from den.dag.scenarios import load_tasks as load_files
from den.data import load_set
from den.recipes.base import Method
from den.recipes.dag.search import train as search
from den.recipes.den import train
from den.support import launched, ranks
from den.train.config import (
    DataConfig,
    EstimatorTraining,
    MethodConfig,
    NetworkConfig,
    PhaseConfig,
    SelectorTraining,
    TrainConfig,
)
from den.train.engine import Engine

change, PHASE = dataclasses.replace, PhaseConfig(2, 0.01)
DEN = TrainConfig(
    stages=1, epoch_steps=2, progress=False, device="cpu",
    data=DataConfig(tasks=("fashion", "digits"), batch_size=7, validation=0.2),
    network=NetworkConfig(backbone="wrn8_1", trunk_size=8),
    estimator=EstimatorTraining(first=PHASE, later=PHASE, finish=PHASE, tau=0.2),
    selector=SelectorTraining(phase=PHASE), methods=MethodConfig(share_rounds=1),
)  # fmt: skip
LONGER = change(DEN, estimator=change(DEN.estimator, first=PhaseConfig(4, 0.01)))
STEERED = SelectorTraining(phase=PHASE, budget=0.5, baseline="running-mean")
DAG = DagTrainConfig(
    epoch_steps=2, progress=False, device="cpu", data=DagDataConfig(batch_size=9, validation=0.3),
    network=DagNetworkConfig(states=4, flow=2, channels=4, trunk_size=4),
    training=DagTraining(steps=6, shares=(0.3, 0.4, 0.3), rate=0.02, fine_rate=0.02),
    reduction=ReductionConfig(ranking="random", norm_batches=2),
)  # fmt: skip
SCENES = DagDataConfig("nyuv2", batch_size=3, classes=13, validation=0.3, workers=1)
RUNS = {
    "den": change(DEN, selector=STEERED),  # of a batch one process has four images, the other one three
    "level-0": change(DEN, data=change(DEN.data, batch_size=2)),  # one process: one image of one task, at level 0
    "pieces": change(DEN, data=change(DEN.data, batch_size=9)),
    "bfloat16": change(DEN, mode="dense", precision="bfloat16"),
    "nestednet": change(LONGER, mode="nestednet", sharding="zero2"),  # begun by one process, continued by two
    "dag": DAG,
    "dag-dense": change(DAG, data=SCENES, sharding="zero2"),
    "routing": change(LONGER, mode="routing"),  # one process dies
    "handed-on": LONGER,  # begun by two processes, continued by one
    "sharded": change(LONGER, sharding="zero2"),  # likewise
}
HANDED_ON = ("handed-on", "sharded")


def say(*words: object) -> None:
    """Print a line at once: with `print`, lines of two processes may mix."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def sets(name: str, split: str, root: Path | None) -> object:
    """A few digits as the images of either task."""
    return change(load_set("digits", split).subset(torch.arange(60)), name=name)


def tasks(data: DagDataConfig, split: str, root: Path | None = None) -> list:
    """Two tasks of different classes out of the digits; dense ones come from files."""
    if data.scenario == "nyuv2":
        return load_files(data, split, root)
    digits, found = load_set("digits", split), []
    for name, kinds in (("low", (0, 1, 2)), ("high", (7, 8, 9))):
        part = digits.subset(torch.isin(digits.labels, torch.tensor(kinds)).nonzero().flatten()[:30])
        found.append(change(part, name=name, labels=part.labels - kinds[0], classes=3))
    return found


def by_turns(count: int, blocks: int, levels: int, tau: float, draws: object) -> torch.Tensor:
    """Structures of level 0 and of the highest level in turns, over the whole batch."""
    rows = torch.arange(count) if isinstance(draws, torch.Generator) else draws.rows
    return ((rows % 2) * (levels - 1))[:, None].expand(-1, blocks)


def ended_at(step: int, end: object) -> object:
    """An update of the engine before which, at a step, `end` is called with the engine."""
    plain = Engine.update

    def update(self: Engine, objective: object) -> None:
        if self.position.total_steps == step and self._piece == 0:
            end(self)
        plain(self, objective)

    return update


def interrupt(engine: Engine) -> None:
    """Say how many gradients and states of its parameters this process has, and end."""
    optimiser = engine.optimisers["estimator"]
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    kept = sum(parameter.grad is not None for parameter in parameters)
    say("kept", engine.config.out.name, ranks.rank(), kept, len(optimiser.state), len(parameters))
    raise KeyboardInterrupt


def patches(name: str) -> list:
    """What is different in a run."""
    found = []
    if name == "level-0":
        found.append(mock.patch("den.recipes.den.initial_structures", by_turns))
    if name == "pieces":  # norms of a piece are not those of the whole; all else is the same
        found.append(mock.patch.object(Method, "enter", lambda self, engine, phase: self.model.eval()))
    if name == "routing" and ranks.rank() == 1 and not launched.restarts():
        found.append(mock.patch.object(Engine, "update", ended_at(3, lambda _: os._exit(9))))
    return found


def run(folder: Path, name: str, **changes: object) -> None:
    """Train a run of `RUNS`, with other settings, in its folder."""
    config = change(RUNS[name], out=folder / name, **changes)
    if name == "dag-dense":
        config = change(config, data=change(config.data, root=folder.parent / "scenes"))
    with ExitStack() as stack:
        stack.enter_context(mock.patch("den.recipes.setup.load_set", sets))
        stack.enter_context(mock.patch("den.recipes.dag.recipe.load_tasks", tasks))
        for patch in patches(name):
            stack.enter_context(patch)
        trains = search if isinstance(config, DagTrainConfig) else train
        begun = name in ("nestednet", *HANDED_ON) and (config.out / "last.safetensors").exists()
        model = trains(config, resume=begun)
    content = b"".join(tensor.contiguous().numpy().tobytes() for tensor in model.state_dict().values())
    say(name, hashlib.sha256(content).hexdigest())


def run_until(folder: Path, name: str, step: int) -> None:
    """Train a run until an update, which does not happen."""
    with mock.patch.object(Engine, "update", ended_at(step, interrupt)):
        try:
            run(folder, name)
        except KeyboardInterrupt:
            return
    raise RuntimeError("the run was not interrupted")


def main(folder: Path) -> None:
    """Train what is to be trained by one of two processes."""
    for name in ("routing",) if launched.restarts() else [name for name in RUNS if name not in HANDED_ON]:
        run(folder, name, **({"accumulate": 2} if name == "pieces" else {}))
        if name == "den":
            try:
                run(folder, name)
            except ValueError as error:
                say("refused", type(error).__name__, error)
    for name in HANDED_ON:
        run_until(folder, name, 3)


def launch(folder: Path, attempt: int) -> bool:
    """Start two processes and wait for them; one that fails ends the other.  Returns whether both have succeeded."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = {}
    for rank in range(2):
        if not (pid := os.fork()):
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
            told |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_RESTART_COUNT": attempt}
            os.environ.update({name: str(value) for name, value in told.items()})
            try:
                main(folder)
            except ValueError as error:
                say("failed", error)
                os._exit(2)
            os._exit(0)
        processes[pid] = rank
    succeeded = True
    while processes:
        pid, status = os.wait()
        say("ended", processes.pop(pid), os.waitstatus_to_exitcode(status))
        succeeded &= status == 0
        if status and processes:
            signal.sigtimedwait({signal.SIGCHLD}, 20)  # the other one notices by itself
            for other in processes:
                os.kill(other, signal.SIGKILL)
    return succeeded


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads would not survive the fork
    sys.exit(not any(launch(Path(sys.argv[1]), attempt) for attempt in range(2)))
