"""Everything that a search needs and `den.dag.search` does not say: stages, batches, measurements, checkpoints."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from den.dag.config import SEARCHING, DagTrainConfig
from den.dag.evaluate import evaluate_tasks
from den.dag.graph import SubGraph
from den.dag.model_config import DagConfig, quarter
from den.dag.network import DagNetwork
from den.dag.peers import CrossStitchNetwork, PeerNetwork, SeparateNetworks
from den.dag.scenarios import load_tasks
from den.data import Batch, ImageSet, MixedTaskBatches, SceneSet
from den.nn.tasks import Task
from den.support.device import choose_device
from den.support.progress import Progress
from den.support.randomness import random_state, seeded, set_random_state
from den.train.checkpoint import (
    load_checkpoint,
    load_weights,
    optimiser_tensors,
    prefixed,
    reading,
    restore_optimiser,
    save_checkpoint,
    unprefixed,
)
from den.train.engine import Meter, check_finite, restored_position
from den.train.folder import RunFolder
from den.train.phases import schedule_factor

TaskSet = ImageSet | SceneSet
Network = DagNetwork | PeerNetwork
NETWORKS: dict[str, type[Network]] = {
    "dag": DagNetwork,
    "single": SeparateNetworks,
    "cross-stitch": CrossStitchNetwork,
}
STAGES = ("warm-up", "search", "fine-tuning")
SEARCHED = "searched.safetensors"


@dataclass
class Position:
    """Where a run stands; all of it is in a checkpoint."""

    stage: int = 0  # stages done
    step: int = 0  # updates done in the stage at hand
    total_steps: int = 0
    epoch: int = 0
    reduced: bool = False


class DagEngine:
    """A run of `config`: created in its folder, or continued from the last checkpoint there.

    A context manager, which holds the folder and the global generators as `den.train.engine.Engine` does.
    """

    def __init__(self, config: DagTrainConfig, *, resume: bool = False) -> None:
        self.config, self.position, self.meter = config, Position(), Meter()
        self.device = choose_device(config.device)
        self._bar: Progress | None = None
        with ExitStack() as stack:
            self.folder = stack.enter_context(RunFolder(config, resume=resume))
            stack.enter_context(seeded(config.seed, self.device))
            stack.callback(self._close_bar)
            self._build()
            if resume:
                self._restore()
            elif config.start is not None:
                self._take_over(Path(config.start) / SEARCHED)
            self.folder.begin()
            if not resume:
                self._save()
            self._exit = stack.pop_all()

    def __enter__(self) -> DagEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _build(self) -> None:
        config = self.config
        parts = hold_out(load_tasks(config.data, "train"), config.data.validation, config.seed)
        sets, self.held_out = ([each.to(self.device) for each in part] for part in parts)
        tasks = [task for each in sets for task in each.tasks]
        if len(config.training.loss_weights) not in (0, len(tasks)):
            given = list(config.training.loss_weights)
            raise ValueError(f"config: training.loss_weights must be one for each of {len(tasks)} tasks, got {given}")
        self.model = new_network(config, tasks).to(self.device)
        self.steps = stage_steps(config)
        self.batches = make_batches(sets, config)
        training = config.training
        self.optimisers = {
            "weights": torch.optim.SGD(
                weight_groups(self.model, config), training.rate, training.momentum, weight_decay=training.weight_decay,
                nesterov=training.momentum > 0,
            ),
            "gates": torch.optim.Adam(self.model.gates.parameters(), training.gate_rate),
        }  # fmt: skip

    def stage(self, name: str, batches: str = "all") -> Iterator[Batch]:
        """Batches of a stage, from where it stands to its end; none if it is done.  Every epoch is logged and saved."""
        here = self.position
        if STAGES[here.stage :][:1] != (name,):
            return
        total = self.steps[here.stage]
        self.model.gates.requires_grad_(name == "search")
        if self.config.progress and total:
            self._bar = Progress(total, name, unit="update", initial=here.step)
        while here.step < total:
            self.model.train()
            for group in self.optimisers["weights"].param_groups:
                group["lr"] = self.rate() * group["factor"]
            yield self.batches[batches].next()
            here.step += 1
            here.total_steps += 1
            if self._bar is not None:
                self._bar.update()
                if self.device.type == "cpu" or here.step % 50 == 0:
                    self._bar.note(self.meter.text(), refresh=False)
            if here.step == total or here.step % self.epoch_steps == 0:
                self._end_epoch(name)
        here.stage, here.step = here.stage + 1, 0
        self._close_bar()
        if name == "search":
            self._save(self.folder.path / SEARCHED)
        self._save()

    def autocast(self) -> torch.autocast:
        """The precision that the settings ask for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def rate(self) -> float:
        """Learning rate of the weights at the update at hand."""
        here, training = self.position, self.config.training
        if STAGES[here.stage] == "fine-tuning":
            return training.fine_rate * schedule_factor("cosine", here.step / self.steps[2])
        done = here.step + sum(self.steps[: here.stage])
        return training.rate * schedule_factor("cosine", done / sum(self.steps[:2]))

    def learn(self, loss: Tensor, measured: dict[str, Tensor] | None, *optimisers: str) -> None:
        """One step of each of the optimisers on a loss; the others' parameters are left as they are.

        measured: what the update's line in the metrics is averaged from; None: another call of the same update says it.
        """
        if self.device.type == "cpu":  # elsewhere looking at every loss would wait for the device
            check_finite(loss.item(), self.position.total_steps)
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for name in optimisers:
            self.optimisers[name].step()
        if measured is not None:
            self.meter.add(measured)

    def mark_reduced(self) -> None:
        """Remember, on disk too, that the reduction is done.  Momentum of what was does not enter fine-tuning."""
        self.position.reduced = True
        self.optimisers["weights"].state.clear()
        self._save()

    @property
    def epoch_steps(self) -> int:
        """Updates between measurements and checkpoints."""
        return self.config.epoch_steps or self.batches["all"].epoch_steps

    @property
    def temperature(self) -> float:
        """AdaShare's, of the Gumbel-softmax: it falls from epoch to epoch of the search."""
        peers = self.config.peers
        return peers.temperature * peers.cooling ** (self.position.step // self.epoch_steps)

    def _end_epoch(self, stage: str) -> None:
        here, gates, means = self.position, self.model.gates, self.meter.means()
        for value in means.values():
            check_finite(value, here.total_steps)
        here.epoch += 1
        drawn = self.config.mode == "adashare" and stage == "search"  # measured as it trains, but for the noise
        with gates.drawn(torch.zeros_like(gates.gamma), self.temperature) if drawn else nullcontext():
            held_out = {name: dataclasses.asdict(r) for name, r in evaluate_tasks(self.model, self.held_out).items()}
        edges = gates.gamma.detach().sigmoid().sum(1)
        self.folder.log({
            "epoch": here.epoch, "step": here.total_steps, "stage": stage, "train": means,
            "held_out": held_out,
            "gates": {"mean_edges": edges.mean().item(), "edges": edges.tolist(), "spread": gates.spread().tolist()},
        })  # fmt: skip
        self.meter.clear()
        if here.step < self.steps[here.stage]:
            self._save()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _save(self, path: Path | None = None) -> None:
        tensors = prefixed("model", self.model.state_dict())
        for name, optimiser in self.optimisers.items():
            tensors |= prefixed(f"optimiser.{name}", optimiser_tensors(optimiser))
        cursors = {}
        for name, batches in self.batches.items():
            state = batches.state_dict()
            cursors[name] = state.pop("cursors")
            tensors |= prefixed(f"batches.{name}", state)
        states, generators = random_state(self.device)
        tensors |= states
        record = {
            "dag": self.model.config.to_dict(), "network": type(self.model).__name__,
            "position": dataclasses.asdict(self.position), "cursors": cursors,
            **generators,
        }  # fmt: skip
        save_checkpoint(path or self.folder.last, tensors, record)

    def _restore(self) -> None:
        path = self.folder.last
        tensors, record = self.folder.load()
        load_weights(self.model, tensors, path)
        with reading(path):
            for name, optimiser in self.optimisers.items():
                restore_optimiser(optimiser, unprefixed(f"optimiser.{name}", tensors))
            self._restore_batches(tensors, record)
            self.position = restored_position(Position, record["position"])
            if "python" in record:  # older checkpoints have no generators
                set_random_state(tensors, record, self.device)
        self.folder.rewind(self.position.epoch)

    def _restore_batches(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        for name, batches in self.batches.items():
            batches.load_state_dict({**unprefixed(f"batches.{name}", tensors), "cursors": record["cursors"][name]})

    def _take_over(self, path: Path) -> None:
        """The searched network of another run, ready to be reduced; its batches go on from where they stood."""
        tensors, record = load_checkpoint(path)
        load_weights(self.model, tensors, path)
        with reading(path):
            self._restore_batches(tensors, record)
        self.position = Position(stage=2, total_steps=sum(self.steps[:2]))


def load_network(path: Path) -> Network:
    """The network of a checkpoint, in evaluation mode; ValueError when it holds none."""
    tensors, record = load_checkpoint(path)
    if "dag" not in record:
        raise ValueError(f"load_checkpoint: {path} must hold a network of den dag train, got another")
    kinds = {kind.__name__: kind for kind in NETWORKS.values()}
    with reading(path):
        model = kinds[record.get("network", DagNetwork.__name__)](DagConfig.from_dict(record["dag"]))
    load_weights(model, tensors, path)
    return model.eval()


def weight_groups(model: Network, config: DagTrainConfig) -> list[dict[str, Any]]:
    """The optimiser's groups of what is learned but the gates; `factor`: of the learning rate."""
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("gates.")}
    groups = [{"params": [p for name, p in learned.items() if name != "stitches"], "factor": 1.0}]
    if "stitches" in learned:
        groups.append({"params": [learned["stitches"]], "factor": config.peers.stitch_rate, "weight_decay": 0.0})
    return groups


def new_network(config: DagTrainConfig, tasks: Sequence[Task]) -> Network:
    """The network of `config`; its weights are drawn with the seed, global generators stay as they were."""
    network = config.network
    shape: dict[str, Any] = {
        name: getattr(network, name) for name in ("states", "flow", "channels", "trunk_size", "gates", "stages")
    }
    if config.mode == "adashare":
        shape["gates"] = "bare"
    if dense := [task for task in tasks if task.dense]:
        shape["trunk_size"] = quarter(dense[0])
    with seeded(config.seed):
        model = NETWORKS.get(config.mode, DagNetwork)(DagConfig(tuple(tasks), **shape))
    whole, states = model.graph.whole(), model.graph.states
    first = tuple(network.read_in or j == 0 for j in range(states))
    last = tuple(network.read_out or j == states - 1 for j in range(states))
    for k in range(len(tasks)):
        model.keep(k, SubGraph(model.graph, whole.edges, first, last))
    return model


def stage_steps(config: DagTrainConfig) -> tuple[int, int, int]:
    """Updates of each stage; what searches nothing has fine-tuning only.

    Warns where the squeeze loss can never act, because the gates begin below kappa.
    """
    training = config.training
    if config.mode not in SEARCHING:
        return 0, 0, training.steps
    if training.squeeze and training.kappa > 0.5:
        warnings.warn(
            f"training.kappa is {training.kappa} of the edges, but all gates begin at 1/2: the squeeze loss acts only"
            " where they grow; set it below 0.5",
            stacklevel=2,
        )
    first, second = (round(share * training.steps) for share in training.shares[:2])
    return first, second, training.steps - first - second


def hold_out(sets: list[TaskSet], share: float, seed: int) -> tuple[list[TaskSet], list[TaskSet]]:
    """Training sets, and the part of them that is held out."""
    if share == 0:
        return sets, []
    splits = [each.split(share, seed) for each in sets]
    return [kept for kept, _ in splits], [held_out for _, held_out in splits]


def make_batches(sets: list[TaskSet], config: DagTrainConfig) -> dict[str, MixedTaskBatches]:
    """Batches of all training images, and of the two halves that weights and gates learn from in turn."""
    weights, gates = hold_out(sets, 0.5, config.seed)
    parts = {"all": sets, "weights": weights, "gates": gates}
    shares = [float(len(image_set)) for image_set in sets]
    return {
        name: MixedTaskBatches(part, config.data.batch_size, shares, config.seed + offset)
        for offset, (name, part) in enumerate(parts.items())
    }
