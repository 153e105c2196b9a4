"""The recipe of `den dag train`: phases, images, network, optimisers and measurements of a search and its peers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from den.dag.config import DagTrainConfig
from den.dag.evaluate import evaluate_tasks
from den.dag.graph import SubGraph
from den.dag.losses import batch_losses
from den.dag.model_config import DagConfig, quarter
from den.dag.network import DagNetwork
from den.dag.peers import CrossStitchNetwork, PeerNetwork, SeparateNetworks
from den.dag.pretrained import load_pretrained, pretrained_map_size
from den.dag.scenarios import has_validation, load_tasks, loss_weights
from den.data import Batch, BatchStream, ImageSet, MixedTaskBatches, SceneSet
from den.data.inputs import Inputs, inputs_of
from den.data.loaders import LoaderSet
from den.data.reading import chosen_workers
from den.nn.tasks import Task
from den.recipes.dag.balance import Balance
from den.recipes.dag.gradients import Combine, cagrad, combined_backward, pcgrad
from den.recipes.dag.levels import random_levels
from den.recipes.dag.phases import SearchPhase, search_phases
from den.support.randomness import seeded
from den.support.settings import to_dict
from den.train.checkpoint import load_checkpoint, load_weights, reading
from den.train.engine import Engine
from den.train.objective import Objective
from den.train.phases import Phase
from den.train.recipe import Measured, Recipe
from den.train.state import take_over

TaskSet = ImageSet | SceneSet | LoaderSet
Network = DagNetwork | PeerNetwork
NETWORKS: dict[str, type[Network]] = {
    "dag": DagNetwork,
    "single": SeparateNetworks,
    "cross-stitch": CrossStitchNetwork,
}
SEARCHED = "searched.safetensors"


class TaskData(NamedTuple):
    """Data that a run trains and is measured on: its tasks, streams of batches (all, weights, gates), held-out sets,
    and how pictures become inputs of each task (none where data loaders make them)."""

    tasks: list[Task]
    batches: Mapping[str, BatchStream]
    held_out: list[TaskSet]
    inputs: dict[str, Inputs]


DataOf = Callable[[DagTrainConfig, torch.device], TaskData]


def scenario_data(config: DagTrainConfig, device: torch.device) -> TaskData:
    """The data of a run's scenario, on a device."""
    parts = hold_out(load_tasks(config.data, "train"), config.data.validation, config.seed)
    if has_validation(config.data):
        parts = parts[0], load_tasks(config.data, "validation")
    sets, held_out = ([each.to(device) for each in part] for part in parts)
    tasks = [task for each in sets for task in each.tasks]
    ink = config.data.scenario == "omniglot"
    inputs = {task.name: inputs_of(each, ink) for each in sets for task in each.tasks}
    return TaskData(tasks, make_batches(sets, config), [*held_out], inputs)


class SearchRecipe(Recipe):
    """A search, or the training of a peer, on the images of its scenario or what else `data` gives.

    Attributes:
        reduced: whether the tasks have been reduced to what they keep.
    """

    model: Network
    keeps_best = False

    def __init__(self, config: DagTrainConfig, device: torch.device, data: DataOf | None = None) -> None:
        self.config, self.reduced = config, False
        tasks, self.batches, self.held_out, self.inputs = (data or scenario_data)(config, device)
        self.model = new_network(config, tasks).to(device)
        self.balance = Balance(config.training.balance, loss_weights(config, tasks), device)
        training = config.training
        self.optimisers = {
            "weights": torch.optim.SGD(
                weight_groups(self.model, config, self.balance.parameters), training.rate, training.momentum,
                weight_decay=training.weight_decay, nesterov=training.momentum > 0,
            ),
            "gates": torch.optim.Adam(self.model.gates.parameters(), training.gate_rate),
        }  # fmt: skip

    def phases(self) -> tuple[SearchPhase, ...]:
        return search_phases(self.config)

    def loss(self, engine: Engine[Any], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted losses of the tasks of a batch [K], and what to report of them."""
        with self._levels(engine), engine.autocast():
            losses, measured = batch_losses(self.model, batch)
        return self.balance.weighted(losses), measured

    def objective(
        self, engine: Engine[Any], batch: Batch, optimisers: tuple[str, ...] = (), extra: Tensor | None = None
    ) -> Objective:
        """Objective of an update of the weights: the weighted losses and `extra`, with gradients as the settings
        say."""
        with self._levels(engine), engine.autocast():
            losses, told = batch_losses(self.model, batch)
        self.balance.add(losses)
        weighted = self.balance.weighted(losses)
        total = weighted.sum() if extra is None else weighted.sum() + extra
        backward = None
        if self.config.training.gradients != "sum":
            model = cast(DagNetwork, self.model)  # of others the settings refuse it
            shared = [*model.edges.parameters(), *model.stages.parameters()]
            backward = partial(combined_backward, weighted, total, shared, self._combine(engine))
        return Objective(total, told, optimisers, backward)

    def _levels(self, engine: Engine[Any]) -> AbstractContextManager[None]:
        """Context in which elastic edges are trained at random levels, until the tasks' levels are chosen."""
        if self.reduced or not isinstance(self.model, DagNetwork):
            return nullcontext()
        return random_levels(self.model, engine.generator)

    def _combine(self, engine: Engine[Any]) -> Combine:
        if self.config.training.gradients == "cagrad":
            return partial(cagrad, c=self.config.training.conflict)
        seed = self.config.seed * 1_000_003 + engine.position.total_steps
        return partial(pcgrad, generator=torch.Generator().manual_seed(seed))

    def begin(self, engine: Engine[Any]) -> None:
        """Take over the searched network of `start`, ready to be reduced."""
        if self.config.start is not None:
            take_over(engine, Path(self.config.start) / SEARCHED)
            engine.position.phase = 2
            engine.position.total_steps = sum(phase.settings.steps for phase in engine.phases[:2])

    def enter(self, engine: Engine[Any], phase: SearchPhase) -> None:
        self.model.train()
        self.model.gates.requires_grad_(phase.name == "search")

    def check_pieces(self, processes: int, pieces: int) -> None:
        super().check_pieces(processes, pieces)
        if processes * pieces > 1 and self.config.training.gradients != "sum":
            raise ValueError(
                "config: training.gradients must be sum with several processes or pieces of a batch,"
                f" got {self.config.training.gradients}"
            )
        batches = self.batches["all"]
        if not isinstance(batches, MixedTaskBatches):
            return
        plain = [n for each, n in zip(batches.sets, batches.counts, strict=True) if not each.tasks[0].dense]
        if plain and min(plain) < 2 * pieces:
            raise ValueError(
                "config: data.batch_size must give every task two images for the batch norm of its head, in each of"
                f" {pieces} pieces, got {min(plain)} of {sum(batches.counts)}"
            )

    def temperature(self, engine: Engine[Any]) -> float:
        """Temperature of AdaShare's Gumbel-softmax, which falls from epoch to epoch of the search."""
        peers = self.config.peers
        return peers.temperature * peers.cooling ** (engine.position.step // engine.epoch_steps)

    def epoch_steps(self, phase: Phase) -> int:
        return self.batches["all"].epoch_steps

    def measure(self, engine: Engine[Any], phase: SearchPhase) -> Measured:
        """Results of every task, and the gates."""
        self.balance.end_epoch()
        gates = self.model.gates
        drawn = self.config.mode == "adashare" and phase.name == "search"  # measured as it trains, but for the noise
        with gates.drawn(torch.zeros_like(gates.gamma), self.temperature(engine)) if drawn else nullcontext():
            results = evaluate_tasks(self.model, self.held_out, shared=True)
        edges = gates.gamma.detach().sigmoid().sum(1)
        told = {"mean_edges": edges.mean().item(), "edges": edges.tolist(), "spread": gates.spread().tolist()}
        return Measured({"held_out": {name: dataclasses.asdict(r) for name, r in results.items()}, "gates": told})

    def kept(self, phase: SearchPhase) -> tuple[str, ...]:
        return (SEARCHED,) if phase.name == "search" else ()

    def record(self) -> dict[str, Any]:
        inputs = {name: to_dict(each) for name, each in self.inputs.items()}
        return {
            "dag": self.model.config.to_dict(), "network": type(self.model).__name__, "reduced": self.reduced,
            "inputs": inputs, "balance": self.balance.record(),
        }  # fmt: skip

    def restore(self, record: dict[str, Any]) -> None:
        self.reduced = record["reduced"]
        if "balance" in record:  # earlier versions had fixed weights only
            self.balance.restore(record["balance"])


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


def weight_groups(
    model: Network, config: DagTrainConfig, undecayed: Sequence[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """The optimiser's groups of what is learned but the gates; `factor`: of the learning rate."""
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("gates.")}
    groups = [{"params": [p for name, p in learned.items() if name != "stitches"], "factor": 1.0}]
    if "stitches" in learned:
        groups.append({"params": [learned["stitches"]], "factor": config.peers.stitch_rate, "weight_decay": 0.0})
    if undecayed:
        groups.append({"params": [*undecayed], "factor": 1.0, "weight_decay": 0.0})
    return groups


def new_network(config: DagTrainConfig, tasks: Sequence[Task]) -> Network:
    """The network of `config`; its weights are drawn with the seed, global generators stay as they were."""
    network = config.network
    shape: dict[str, Any] = {
        name: getattr(network, name)
        for name in ("states", "flow", "channels", "trunk_size", "gates", "stages", "edge", "groups", "stem")
    }
    if config.mode == "adashare":
        shape["gates"] = "bare"
    with seeded(config.seed):
        if network.stem != "conv":
            shape["trunk_size"] = pretrained_map_size(network.stem, tasks)
        elif dense := [task for task in tasks if task.dense]:
            shape["trunk_size"] = quarter(dense[0])
        model = NETWORKS.get(config.mode, DagNetwork)(DagConfig(tuple(tasks), **shape))
        if network.stem != "conv" and network.pretrained:
            load_pretrained(model)
    whole, states = model.graph.whole(), model.graph.states
    first = tuple(network.read_in or j == 0 for j in range(states))
    last = tuple(network.read_out or j == states - 1 for j in range(states))
    for k in range(len(tasks)):
        model.keep(k, SubGraph(model.graph, whole.edges, first, last))
    return model


def hold_out(
    sets: list[ImageSet | SceneSet], share: float, seed: int
) -> tuple[list[ImageSet | SceneSet], list[ImageSet | SceneSet]]:
    """Training sets, and the part of them that is held out."""
    if share == 0:
        return sets, []
    splits = [each.split(share, seed) for each in sets]
    return [kept for kept, _ in splits], [held_out for _, held_out in splits]


def make_batches(sets: list[ImageSet | SceneSet], config: DagTrainConfig) -> dict[str, MixedTaskBatches]:
    """Batches of all training images, and of the two halves that weights and gates learn from in turn."""
    weights, gates = hold_out(sets, 0.5, config.seed)
    parts = {"all": sets, "weights": weights, "gates": gates}
    shares = [1.0 if config.data.scenario == "own" else float(len(image_set)) for image_set in sets]
    workers = chosen_workers(config.data.workers)
    return {
        name: MixedTaskBatches(part, config.data.batch_size, shares, config.seed + offset, workers)
        for offset, (name, part) in enumerate(parts.items())
    }
