"""What a training method decides: its phases, what they minimise, and the structures of its images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from den.data import Batch, ImageSet, MixedTaskBatches
from den.evaluate.accuracy import Choice
from den.nn.model import DeepElasticNetwork
from den.nn.task_batch import Images, Tasks
from den.nn.tasks import find_task
from den.train.config import TrainConfig
from den.train.objective import Objective, instance_losses
from den.train.phases import Phase, run_phases

if TYPE_CHECKING:
    from den.train.engine import Engine


class Method:
    """Deep Elastic Networks and their dense baseline as the engine sees them; the compared methods change parts of it.

    What a method has learnt besides the network's weights, such as a table of policies, stands in `state`, a module of
    its own inside the network: it is saved, loaded and moved with the weights.
    """

    def __init__(self, model: DeepElasticNetwork, config: TrainConfig) -> None:
        self.model, self.config, self.state = model, config, nn.Module()
        model.add_module("method", self.state)

    def structures(self, images: Images, task: Tasks) -> Tensor | None:
        """Levels int64 [B, N] of images at inference, on their device; None: the full structure for all of them."""
        return None if self.config.mode == "dense" else self.model.select(images, task)

    def phases(self) -> tuple[Phase, ...]:
        """The phases of a run, in order; network and stage tell each from the others."""
        return run_phases(self.config)

    def batches(self, sets: list[ImageSet]) -> Any:
        """The batches of a run: a `MixedTaskBatches`, or what can stand in for one."""
        data = self.config.data
        return MixedTaskBatches(sets, data.batch_size, data.shares or None, self.config.seed)

    def policy_parameters(self) -> list[nn.Parameter]:
        """What the selector's optimiser updates."""
        return [*self.model.selector.parameters(), *self.state.parameters()]

    def faster(self) -> dict[str, Any]:
        """Arguments of `den.train.engine.estimator_optimiser`: parameters that learn faster than the others."""
        return {}

    def prepare(self, engine: Engine, phase: Phase) -> None:
        """Called before every batch, with the networks in the modes of the phase."""

    def choice(self, phase: Phase) -> Choice:
        """The structures that held-out images are measured at after an epoch of a phase."""
        return "full" if phase.network == "estimator" and phase.stage == 1 else "selected"

    def comparable(self, phase: Phase) -> bool:
        """Whether epochs of a phase may be compared with one another to choose the checkpoint "best"."""
        return self.config.mode == "dense" or phase.network != "estimator" or phase.stage > 1

    def state_dict(self) -> dict[str, Tensor]:
        """What the method has learnt besides the network's weights."""
        return self.state.state_dict()

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`; RuntimeError for another method's."""
        self.state.load_state_dict(tensors)


class ComparedMethod(Method, ABC):
    """What the compared methods have in common: the estimator's first phase, measured as it is used."""

    @abstractmethod
    def objective(self, engine: Engine, phase: Phase, batch: Batch) -> Objective:
        """What an update of a phase minimises."""

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("estimator", 1, self.config.estimator.first, 1.0),)

    def choice(self, phase: Phase) -> Choice:
        return self.structures

    def comparable(self, phase: Phase) -> bool:
        """In the last phase: before, something has not been trained yet."""
        return phase == self.phases()[-1]


def estimator_loss(engine: Engine, batch: Batch, structures: Tensor | None) -> Objective:
    """Mean cross-entropy of the batch at its structures (equation 4; S(z) does not depend on the estimator)."""
    logits = engine.model.estimator(batch.images, batch.tasks, structures)
    loss = instance_losses(logits, batch.labels).mean()
    ratio = engine.flops_ratio(structures)
    return Objective(loss, {"loss": loss.detach(), "accuracy": answers(logits, batch).mean(), "flops_ratio": ratio})


def answers(logits: list[Tensor], batch: Batch) -> Tensor:
    """1 for every instance of a mixed-task batch that is classified right, 0 for the others: float32 [B]."""
    return torch.cat([p.argmax(1) == y for p, y in zip(logits, batch.labels, strict=True)]).float()


def task_rows(table: Tensor, model: DeepElasticNetwork, images: Images, task: Tasks) -> Tensor:
    """Rows of a table [K, ...], one for each image, by the image's task: [B, ...] on the network's device."""
    table = table.to(model.estimator.level_flops.device)
    if isinstance(images, Tensor) and isinstance(task, Tensor) and task.dim():
        return table[task.to(table.device)]
    pairs = [(task, images)] if isinstance(images, Tensor) else zip(task, images, strict=True)
    return torch.cat([table[find_task(k, model.tasks)].expand(len(part), *table.shape[1:]) for k, part in pairs])


def skippable(model: DeepElasticNetwork, name: str) -> None:
    """ValueError unless every block can be left out."""
    if model.estimator.level_parameters[:, 0].any():
        raise ValueError(
            f"{name}: backbone must be of residual blocks, which can be left out, got {model.config.backbone}"
        )
