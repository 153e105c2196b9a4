"""An auxiliary loss of the selector: its features are to tell what structures cost an image.  Ours, not the paper's.

REINFORCE tells the selector only which of a few sampled structures were better than the others of an image, and by a
noisy number.  A regression on the same costs learns which images are hard from every one of them.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from den.nn.model import DeepElasticNetwork
from den.train.checkpoint import prefixed


class CostHead(nn.Module):
    """Predicts the cost of structures of an image: a number of the image, and one for the level of each block.

    All weights begin at 0.
    """

    def __init__(self, features: int, blocks: int, levels: int) -> None:
        super().__init__()
        self.blocks, self.levels = blocks, levels
        self.costs = nn.Linear(features, 1 + blocks * levels)
        nn.init.zeros_(self.costs.weight)
        nn.init.zeros_(self.costs.bias)

    def forward(self, features: Tensor, structures: Tensor) -> Tensor:
        """Costs float32 [B, S] of structures int64 [B, S, N] of images with features [B, C]."""
        every = self.costs(features).float()
        of_levels = every[:, 1:].view(-1, self.blocks, self.levels)
        return every[:, :1] + of_levels.gather(2, structures.transpose(1, 2)).sum(1)


def cost_head(model: DeepElasticNetwork) -> CostHead:
    """A head for the selector of a network, on its device."""
    features = model.selector.heads[0].in_features
    return CostHead(features, model.num_blocks, model.levels).to(model.estimator.level_flops.device)


def with_costs_of(state: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a checkpoint to start from, with the head of costs of `state` if it has one, and no other."""
    name = "model.method.costs"
    others = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{name}.")}
    head = getattr(state, "costs", None)
    return others | (prefixed(name, head.state_dict()) if isinstance(head, CostHead) else {})


def cost_loss(predicted: Tensor, costs: Tensor) -> Tensor:
    """Huber's loss of predicted costs [B, S], mean over the structures of each image: [B]."""
    return F.smooth_l1_loss(predicted, costs.float(), reduction="none").mean(1)
