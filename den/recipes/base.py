"""Training methods of one network: phases, what they minimise, and the structures of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from den.data import Batch, ImageSet, MixedTaskBatches
from den.data.images import Labels
from den.evaluate.accuracy import Choice, equal_structures, evaluate, full_flops
from den.nn.model import DeepElasticNetwork
from den.nn.task_batch import Images, TaskBatch, Tasks, find_task
from den.recipes.auxiliary import cost_head, with_costs_of
from den.recipes.setup import estimator_optimiser
from den.support.device import sent
from den.support.settings import to_dict
from den.train.checkpoint import load_checkpoint, load_weights
from den.train.config import PhaseConfig, TrainConfig
from den.train.engine import Engine
from den.train.objective import Objective, RunningBaseline, instance_losses
from den.train.phases import NetworkPhase, estimator_updates, run_phases
from den.train.recipe import Measured, Recipe


class Method(Recipe):
    """Deep Elastic Networks and their dense baseline; the compared methods change parts of it.

    What a method has learnt besides the network's weights, such as a table of policies, stands in `state`, a module of
    its own inside the network: it is saved, loaded and moved with the weights.
    """

    model: DeepElasticNetwork
    state_kind: type[nn.Module] = nn.Module
    teacher: DeepElasticNetwork | None = None  # a trained network whose answers the estimator learns

    def __init__(self, model: DeepElasticNetwork, config: TrainConfig) -> None:
        self.model, self.config, self.state = model, config, self.state_kind()
        if config.mode == "den" and config.selector.auxiliary:
            self.state.costs = cost_head(model)
        model.add_module("method", self.state)
        self.full_flops = full_flops(model)

    def train_on(self, sets: list[ImageSet], held_out: list[ImageSet]) -> None:
        """Make ready for an engine: a training set for each task, and what epochs are measured on, on one device."""
        config = self.config
        self.sets, self.held_out, self.batches = sets, held_out, self.streams(sets)
        self.images = {image_set.name: image_set.kept for image_set in sets}
        self.optimisers = {
            "estimator": estimator_optimiser(self.model.estimator, config.estimator, **self.faster()),
            "selector": torch.optim.Adam(self.policy_parameters(), lr=config.selector.phase.rate),
        }
        self.baseline = RunningBaseline(config.data.tasks)

    def structures(self, images: Images, task: Tasks) -> Tensor | None:
        """Levels int64 [B, N] of images at inference, on their device; None: the full structure for all of them."""
        return None if self.config.mode == "dense" else self.model.select(images, task)

    def phases(self) -> tuple[NetworkPhase, ...]:
        return run_phases(self.config)

    def streams(self, sets: list[ImageSet]) -> dict[str, MixedTaskBatches]:
        """The batches of a run, by the name that phases have for their stream."""
        data, seed = self.config.data, self.config.seed
        if data.joint and len(sets) > 1:
            return {"all": MixedTaskBatches([Labels(sets, self.config.joint)], data.batch_size, None, seed)}
        return {"all": MixedTaskBatches(sets, data.batch_size, data.shares or None, seed)}

    def choose(self, batch: Batch) -> Tensor:
        """The selector's logits [B, N, L] of the images of a batch, each image once."""
        return self.model.selector.run(*read(self.model, batch))

    def estimate(self, batch: Batch, structures: Tensor | None) -> list[Tensor]:
        """Logits of every part of a batch at structures [B, N] of its images, or [B, S, N]; None: the full ones."""
        return self.model.estimator.part_logits(batch.for_network(self.model.positions), structures)

    def policy_parameters(self) -> list[nn.Parameter]:
        """Parameters that the selector's optimiser updates."""
        return [*self.model.selector.parameters(), *self.state.parameters()]

    def faster(self) -> dict[str, Any]:
        """Arguments of `estimator_optimiser`: parameters that learn faster than the others."""
        return {}

    def check_pieces(self, processes: int, pieces: int) -> None:
        super().check_pieces(processes, pieces)
        for name, whole in (("routing", self.config.mode), ("running-mean", self.config.selector.baseline)):
            if pieces > 1 and name == whole:
                raise ValueError(f"config: accumulate must be 1 with {name}, which needs whole batches, got {pieces}")

    def norms_apart(self) -> list[nn.Module]:
        """The selector's norms of tasks with one image in a batch, which have no statistics of their own."""
        norms, counts = self.model.selector.norms, cast(MixedTaskBatches, self.batches["all"]).counts
        of_norms = counts if len(counts) == len(norms) else (sum(counts),) * len(norms)
        return [norm for norm, count in zip(norms, of_norms, strict=True) if count < 2]

    def begin(self, engine: Engine[Any]) -> None:
        """Take over the network of the run to start from, if there is one; ValueError where it is another's."""
        if self.config.start is not None:
            path = Path(self.config.start) / "last.safetensors"
            tensors, _ = load_checkpoint(path)
            load_weights(self.model, with_costs_of(self.state, tensors), path)

    def enter(self, engine: Engine[Any], phase: NetworkPhase) -> None:
        """Put the network that trains into training mode, the other one into evaluation mode."""
        self.model.estimator.train("estimator" in phase.trained)
        self.model.selector.train("selector" in phase.trained)

    def choice(self, phase: NetworkPhase) -> Choice:
        """The structures that held-out images are measured at after an epoch of a phase."""
        return "full" if phase.network == "estimator" and phase.stage == 1 else "selected"

    def comparable(self, phase: NetworkPhase) -> bool:
        """True where epochs of a phase may be compared with one another to choose the checkpoint "best"."""
        return self.config.mode == "dense" or phase.network != "estimator" or phase.stage > 1

    def measure(self, engine: Engine[Any], phase: NetworkPhase) -> Measured:
        """Results of every task; the score is the mean over tasks of L + S."""
        reports = evaluate(self.model, self.held_out, self.choice(phase), shared=True)
        text = "; ".join(
            f"{r.task} {r.accuracy:.1%} at {r.flops_ratio:.2f}, {r.structures} structures" for r in reports.values()
        )
        equal: dict[str, Any] = {}
        if self.config.joint:
            equal = {"equal_structures": equal_structures(list(reports.values()))}
            text += f"; one structure for all labels of {equal['equal_structures']:.1%} of the images"
        selector = self.config.selector
        spent = {r.task: r.usage.mean().item() if selector.penalty == "l1" else r.penalty for r in reports.values()}
        score = sum(r.loss + selector.rho * spent[r.task] for r in reports.values()) / len(reports)
        compared = self.comparable(phase) and self.config.data.validation > 0
        held_out = {name: report.summary() for name, report in reports.items()}
        return Measured({"held_out": held_out, **equal}, text, score if compared else None)

    def record(self) -> dict[str, Any]:
        data = {name: to_dict(kept) for name, kept in self.images.items()}
        return {"model": self.model.config.to_dict(), "baseline": self.baseline.record(), "data": data}

    def restore(self, record: dict[str, Any]) -> None:
        self.baseline.restore(record["baseline"])

    def flops_ratio(self, structures: Tensor | None, batch: Batch | None = None) -> Tensor | float:
        """Mean FLOPs of structures [B, N] over those of the full one.  batch: whose structures they are."""
        if structures is None:
            return 1.0
        flops = self.model.estimator.level_flops.gather(1, structures.t()).sum(0).double()
        return (flops.mean() if batch is None else batch.mean(flops)) / self.full_flops

    def estimator_loss(self, batch: Batch, structures: Tensor | None) -> Objective:
        """Mean cross-entropy of the batch at structures [B, N]; None: the full ones.

        Equation 4; S(z) does not depend on the estimator.
        """
        logits = self.estimate(batch, structures)
        loss = batch.mean(instance_losses(logits, batch.labels))
        accuracy, ratio = batch.mean(answers(logits, batch)), self.flops_ratio(structures, batch)
        return Objective(loss, {"loss": loss.detach(), "accuracy": accuracy, "flops_ratio": ratio})

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that the method has learned besides the network's weights."""
        return self.state.state_dict()

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Load the tensors of `state_dict`, of its names and shapes; RuntimeError for another method's."""
        self.state.load_state_dict(tensors)


class ComparedMethod(Method, ABC):
    """Base of the compared methods: they train the estimator's first phase, and are measured as they are used."""

    @abstractmethod
    def objective(self, engine: Engine[Any], phase: NetworkPhase, batch: Batch) -> Objective:
        """The loss that an update of a phase minimises, and means of the batch."""

    def phases(self) -> tuple[NetworkPhase, ...]:
        return (NetworkPhase("estimator", 1, self.first()),)

    def first(self, spent: int = 0, share: float = 1.0) -> PhaseConfig:
        """The phase in which the method trains its network, as long as `methods.updates` says.

        spent: updates of the network in other phases. share: of what remains.
        """
        config = self.config
        total, given = estimator_updates(config), config.estimator.first.steps
        if config.methods.updates == "first":
            return config.estimator.first
        if config.methods.updates == "flops":
            total = round(given * initial_cost(self.model, config) / self.update_cost())
            total += round((estimator_updates(config) - given) * config.methods.chosen_flops / self.update_cost())
        return replace(config.estimator.first, steps=max(1, round((total - spent) * share)))

    def update_cost(self) -> float:
        """FLOPs of an update of the network over those of one at the full structure, for the same batch."""
        return 1.0

    def choice(self, phase: NetworkPhase) -> Choice:
        return self.structures

    def comparable(self, phase: NetworkPhase) -> bool:
        """True in the last phase: in those before, part of the method has not been trained yet."""
        return phase == self.phases()[-1]


def initial_cost(model: DeepElasticNetwork, config: TrainConfig) -> float:
    """Mean FLOPs of the structures of equation 8 over those of the full structure."""
    costs = model.estimator.level_flops.cpu().double()
    anything = (costs.mean(1).sum() / costs[:, -1].sum()).item()
    return config.estimator.tau + (1 - config.estimator.tau) * anything


def read(model: DeepElasticNetwork, batch: Batch) -> tuple[TaskBatch, Tensor | None]:
    """The images of a batch as the selector reads them, and the maps of the estimator's stems where it reads these."""
    images = batch.for_network(model.positions)
    if model.selector.config.reads != "stem":
        return images, None
    with torch.no_grad():
        return images, model.estimator.stem(images)


def logits_and_features(model: DeepElasticNetwork, batch: Batch) -> tuple[Tensor, Tensor]:
    """The selector's logits [B, N, L] of the images of a batch, and the features [B, C] that its heads read."""
    images, stem = read(model, batch)
    features = model.selector.features(images, stem)
    return model.selector.logits(features, images.tasks), torch.cat(features)


def answers(logits: list[Tensor], batch: Batch) -> Tensor:
    """1 for every instance of a mixed-task batch that is classified right, 0 for the others: float32 [B]."""
    return torch.cat([p.argmax(1) == y for p, y in zip(logits, batch.labels, strict=True)]).float()


def task_rows(table: Tensor, model: DeepElasticNetwork, images: Images, task: Tasks) -> Tensor:
    """Rows of a table [K, ...], one for each image, by the image's task: [B, ...] on the network's device."""
    table = sent(table, model.estimator.level_flops.device)
    if isinstance(images, Tensor) and isinstance(task, Tensor) and task.dim():
        return table[task.to(table.device)]
    pairs: Iterable[Any] = [(task, images)] if isinstance(images, Tensor) else zip(cast(Any, task), images, strict=True)
    return torch.cat([table[find_task(k, model.tasks)].expand(len(part), *table.shape[1:]) for k, part in pairs])


def skippable(model: DeepElasticNetwork, name: str) -> None:
    """Raise ValueError unless every block can be left out."""
    if model.estimator.level_parameters[:, 0].any():
        raise ValueError(
            f"{name}: backbone must be of residual blocks, which can be left out, got {model.config.backbone}"
        )
