"""Routing networks (Rosenbaum, Klinger, Riemer, ICLR 2018): a table of chances for each task and block."""

from typing import Any

import torch
from torch import Tensor, nn

from den.data import Batch
from den.nn.model import DeepElasticNetwork
from den.nn.task_batch import Images, Tasks
from den.recipes.base import ComparedMethod, answers, task_rows
from den.support import ranks
from den.train.config import TrainConfig
from den.train.engine import Engine
from den.train.objective import Objective, draw_levels, instance_losses, parameter_fractions, sparsity_penalty
from den.train.phases import NetworkPhase


class Policies(nn.Module):
    """Learned state of the agents."""

    policy: Tensor  # [K, N, L], chances of the levels
    value: Tensor  # [K, N], running mean of the returns of an agent


class Routing(ComparedMethod):
    """The network and one agent per task and block learn together; every image's structure is drawn from its agents.

    The original chooses among function blocks of separate weights; the agents here choose among the levels of one
    block, which share theirs.  Reports call it "routing over levels" and do not set it beside the paper's Routing.

    The return of an image is 1 where its answer is right, -1 where it is not, less S(z) of the DEN paper with
    `selector.rho` (the alternatives of the original cost the same; levels do not).  The agents learn by the weighted
    policy learner; inference takes the arg max.
    """

    state: Policies
    state_kind = Policies

    def __init__(self, model: DeepElasticNetwork, config: TrainConfig) -> None:
        super().__init__(model, config)
        shape, device = (len(model.tasks), model.num_blocks, model.levels), model.estimator.level_flops.device
        self.state.register_buffer("policy", torch.full(shape, 1 / model.levels, device=device))
        self.state.register_buffer("value", torch.zeros(shape[:2], device=device))

    def structures(self, images: Images, task: Tasks) -> Tensor:
        return task_rows(self.state.policy.argmax(-1), self.model, images, task)

    def update_cost(self) -> float:
        """Return what uniform levels cost, with which training begins."""
        return (self.model.estimator.level_flops.double().mean(1).sum() / self.full_flops).item()

    def objective(self, engine: Engine[Any], phase: NetworkPhase, batch: Batch) -> Objective:
        model, settings = self.model, self.config.methods
        chances = task_rows(self.state.policy, model, batch.images, batch.tasks).flatten(0, 1)
        structures = draw_levels(chances, 1, batch.draws(engine.generator)).view(len(batch), model.num_blocks)
        logits = self.estimate(batch, structures)
        loss, right = batch.mean(instance_losses(logits, batch.labels)), answers(logits, batch)
        penalty = sparsity_penalty(structures, parameter_fractions(model), self.config.selector.rho)
        returns, sizes = 2 * right - 1 - penalty, [len(labels) for labels in batch.labels]
        names = [task.name for task in model.tasks]
        for k, (part, levels) in enumerate(zip(returns.split(sizes), structures.split(sizes), strict=True)):
            task = names.index(batch.tasks[k])
            policy, value = self.state.policy[task], self.state.value[task]
            policy.copy_(learn_policy(policy, value, levels, part, settings.routing_rate, batch.whole(k)))
            value.lerp_(ranks.mean(batch.mean(part, k)).expand_as(value), settings.routing_memory)
        ratio = self.flops_ratio(structures, batch)
        return Objective(loss, {"loss": loss.detach(), "accuracy": batch.mean(right), "flops_ratio": ratio})


def learn_policy(
    policy: Tensor, value: Tensor, levels: Tensor, returns: Tensor, rate: float, count: int | None = None
) -> Tensor:
    """The weighted policy learner's update of one task's agents, the mean over the images of a batch: [N, L].

    For every image, with R its return, a the level that an agent drew, V the agent's mean return:

        D = R - V;  D <- D (1 - policy(a)) if D >= 0 else D policy(a);  policy <- project(policy + rate D e_a)

    V is the mean return of the agent whatever it drew (the paper's average return).  Against a mean for each level, D
    would be 0 in the mean for good and bad levels alike and nothing be learnt.

    policy: [N, L].  value: [N].  levels: int64 [B, N].  returns: [B].  count: images of the batch where processes share
    it, each of which has B.
    """
    chance = policy.expand(len(levels), -1, -1).gather(2, levels.unsqueeze(2)).squeeze(2)  # [B, N]
    gain = returns.unsqueeze(1) - value
    gain = torch.where(gain >= 0, gain * (1 - chance), gain * chance)
    step = torch.zeros_like(policy).scatter_add_(1, levels.t(), gain.t())
    return project_to_simplex(policy + rate / (count or len(levels)) * ranks.total(step))


def project_to_simplex(x: Tensor) -> Tensor:
    """The nearest distribution to each row of x [..., L] (Duchi et al., ICML 2008).

    >>> project_to_simplex(torch.tensor([0.9, 0.5, -0.2]))
    tensor([0.7000, 0.3000, 0.0000])
    """
    ordered = x.sort(-1, descending=True).values
    surplus = (ordered.cumsum(-1) - 1) / torch.arange(1, x.shape[-1] + 1, device=x.device)
    kept = (ordered > surplus).sum(-1, keepdim=True)
    return (x - surplus.gather(-1, kept - 1)).clamp_min(0)
