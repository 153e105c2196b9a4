"""PackNet* (DEN paper, after Mallya and Lazebnik, CVPR 2018): nested widths trained one after the other."""

import itertools
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from den.data import Batch
from den.nn.estimator import Estimator
from den.nn.model import DeepElasticNetwork
from den.nn.task_batch import Images, Tasks
from den.recipes.base import ComparedMethod, task_rows
from den.recipes.nestednet import task_levels, usable_levels
from den.train.config import TrainConfig
from den.train.engine import Engine
from den.train.objective import Objective
from den.train.phases import NetworkPhase
from den_kernels import DynamicBatchNorm2d, DynamicConv2d


class PackNet(ComparedMethod):
    """Stage i trains the channel groups that level i has and the level before it has not; those run, frozen.

    Tasks have levels as in NestedNet; a stage trains the tasks of its level, with their stems and heads, on their share
    of every batch, for `estimator.first`: a task sees as many images as in the other methods.  A single task passes
    through all levels that keep a channel.  Frozen groups keep their running statistics too, and are normalised by
    them.  What belongs to no group (the norms of the residual stream) is trained in the first stage only, as the batch
    norms of the original are.

    Raises:
        ValueError: as `NestedNet`.
    """

    def __init__(self, model: DeepElasticNetwork, config: TrainConfig) -> None:
        super().__init__(model, config)
        self.task_levels = task_levels(model, config)
        alone = len(self.task_levels) == 1
        self.order = usable_levels(model) if alone else tuple(sorted(self.task_levels))  # level of each stage
        self.owners = owners(model.estimator, self._stages_of_levels(), self._stages_of_tasks())
        self._stage = 0
        self._frozen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # parameter, where it rests, what it rests at
        self._hooks: list[RemovableHandle] = []

    def structures(self, images: Images, task: Tasks) -> Tensor:
        levels = torch.tensor(self.task_levels)[:, None].expand(-1, self.model.num_blocks)
        return task_rows(levels, self.model, images, task)

    def phases(self) -> tuple[NetworkPhase, ...]:
        count = len(self.order)
        each = self.first(
            share=1.0 if len(self.task_levels) > 1 else 1 / count
        )  # a task sees as many images either way
        return tuple(NetworkPhase("estimator", i + 1, each) for i in range(count))

    def enter(self, engine: Engine[Any], phase: NetworkPhase) -> None:
        """Freeze what a stage does not train."""
        super().enter(engine, phase)
        optimiser, estimator = engine.optimisers["estimator"], self.model.estimator
        if engine.position.step == 0:
            optimiser.state.clear()  # momentum that weight decay has given to channels not trained before
        if phase.stage != self._stage:
            if not self._stage:
                optimiser.register_step_post_hook(lambda *_: self._restore())
            self._freeze(phase.stage)
        for norm in shared_norms(estimator):
            norm.train(phase.stage == 1)
        for stem, stage in zip(estimator.stems, self._stages_of_tasks(), strict=True):
            stem.train(phase.stage == stage)

    def objective(self, engine: Engine[Any], phase: NetworkPhase, batch: Batch) -> Objective:
        level = self.order[phase.stage - 1]
        if len(self.task_levels) > 1:
            k = batch.tasks.index(self.model.tasks[self.task_levels.index(level)].name)
            batch = batch.only(k)
        shape = len(batch), self.model.num_blocks
        return self.estimator_loss(batch, torch.full(shape, level, device=engine.device))

    def _stages_of_levels(self) -> Tensor:
        """The stage that trains what a level adds to the level below it, by level: int64 [L]."""
        stages = [next((i + 1 for i, own in enumerate(self.order) if own >= level), len(self.order) + 1)
                  for level in range(self.model.levels)]  # fmt: skip
        return torch.tensor(stages)

    def _stages_of_tasks(self) -> list[int]:
        """The stage that trains the stem and the head of each task."""
        return [1] if len(self.task_levels) == 1 else [self.order.index(level) + 1 for level in self.task_levels]

    def _freeze(self, stage: int) -> None:
        """Keep copies of what the stage must not change, and normalise frozen channels by their statistics."""
        self._stage = stage
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        parameters = dict(self.model.estimator.named_parameters())
        self._frozen = {
            name: (parameters[name], owner != stage, parameters[name].detach().clone())
            for name, owner in self.owners.items()
        }
        for name, norm in hidden_norms(self.model.estimator).items():
            channels = int((self.owners[f"{name}.weight"] < stage).sum())
            if channels:
                kept = tuple(statistic[:channels].clone() for statistic in statistics(norm))
                self._hooks.append(norm.register_forward_hook(partial(normalise_frozen, kept=kept), with_kwargs=True))

    @torch.no_grad()
    def _restore(self) -> None:
        """Undo the optimiser's step (momentum, weight decay) where the stage trains nothing."""
        for parameter, frozen, kept in self._frozen.values():
            parameter.copy_(torch.where(frozen, kept, parameter))


def normalise_frozen(
    norm: DynamicBatchNorm2d, given: tuple[Any, ...], named: dict[str, Any], output: Tensor, kept: tuple[Tensor, ...]
) -> Tensor:
    """Forward hook: a norm's output [B, C, H, W] with its first c channels normalised by `kept`, mean and variance [c].

    The running statistics of these channels are set back to `kept`.
    """
    if not norm.training:
        return output
    mean, var = kept
    channels = len(mean)
    for statistic, own in zip(statistics(norm), kept, strict=True):
        statistic[:channels] = own
    old = F.batch_norm(given[0][:, :channels], mean, var, norm.weight[:channels], norm.bias[:channels], eps=norm.eps)
    old = old.relu() if named.get("relu") else old
    return torch.cat([old.to(output.dtype), output[:, channels:]], 1)


def statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Running mean and variance [C]."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def owners(estimator: Estimator, of_level: Tensor, of_task: list[int]) -> dict[str, Tensor]:
    """The stage that trains each entry of each parameter, by name: int64, of a shape broadcastable to the parameter.

    of_level: int64 [L], the stage that trains each level's group; of_task: of each task's stem and head.

    A convolution's weight belongs to the later of the groups that it reads and writes, its bias to what it writes.
    """
    device = estimator.level_flops.device
    found = {name: torch.ones((), dtype=torch.int64) for name, _ in estimator.named_parameters()}
    for kind in ("stems", "heads"):
        for k, module in enumerate(getattr(estimator, kind)):
            found |= {f"{kind}.{k}.{name}": torch.tensor(of_task[k]) for name, _ in module.named_parameters()}
    for name, norm in hidden_norms(estimator).items():
        found |= dict.fromkeys((f"{name}.weight", f"{name}.bias"), _stages(norm.groups, of_level))
    for name, module in estimator.blocks.named_modules(prefix="blocks"):
        if isinstance(module, DynamicConv2d):
            out = _stages(module.out_groups or (module.out_channels,), of_level, alone=not module.out_groups)
            read = _stages(module.in_groups or (module.in_channels,), of_level, alone=not module.in_groups)
            read = read if module.groups == 1 else read[:1]  # a cardinality group reads what it writes
            found[f"{name}.weight"] = torch.maximum(out[:, None], read[None, :])[:, :, None, None]
            if module.bias is not None:
                found[f"{name}.bias"] = out.clamp(min=1)
    return {name: stages.to(device) for name, stages in found.items()}


def _stages(groups: tuple[int, ...], of_level: Tensor, alone: bool = False) -> Tensor:
    """The stage of each channel, int64 [C], of sizes of groups and the stages of_level [L].

    Group j is what the level with j + 1 groups adds.  alone: one group, whose channels are not elastic: stage 0.
    """
    if alone:
        return torch.zeros(groups[0], dtype=torch.int64)
    return torch.repeat_interleave(of_level[-len(groups) :], torch.tensor(groups))


def hidden_norms(estimator: Estimator) -> dict[str, DynamicBatchNorm2d]:
    """The batch norms of elastic channels, by name."""
    modules = estimator.blocks.named_modules(prefix="blocks")
    return {n: m for n, m in modules if isinstance(m, DynamicBatchNorm2d) and len(m.groups) > 1}


def shared_norms(estimator: Estimator) -> list[nn.Module]:
    """The batch norms that the tasks share and whose channels are not elastic."""
    hidden = {id(norm) for norm in hidden_norms(estimator).values()}
    shared = itertools.chain(estimator.blocks.modules(), [estimator.norm])
    return [m for m in shared if isinstance(m, nn.BatchNorm2d) and id(m) not in hidden]
