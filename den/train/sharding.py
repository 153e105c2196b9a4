"""Gradients and optimiser states shared out among the processes of a run (ZeRO-2): each parameter has one owner, which
alone keeps its gradient and its state, and updates it for all."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from den.support import ranks
from den.train.checkpoint import optimiser_tensors


class Shards:
    """The owners of all parameters of some optimisers; the same in every process.

    An optimiser makes no state for a parameter without a gradient: `GradientMeans` leaves gradients with their owners
    alone, so that states come to lie there by themselves.  `den.train.gradients` sends them, and this what they become.

    optimisers: by name; of each, every process owns parameters of about as many bytes, neighbours in its order.
    """

    def __init__(self, optimisers: Mapping[str, torch.optim.Optimizer]) -> None:
        self._owners: dict[int, int] = {}
        for optimiser in optimisers.values():
            parameters = [p for group in optimiser.param_groups for p in group["params"]]
            passed, total = 0, sum(p.nbytes for p in parameters)
            for parameter in parameters:
                self._owners.setdefault(id(parameter), passed * ranks.count() // max(total, 1))
                passed += parameter.nbytes
        for optimiser in optimisers.values():
            for parameter in [p for p in optimiser.state if self.owner(p) != ranks.rank()]:  # of a checkpoint
                del optimiser.state[parameter]

    def owner(self, parameter: Tensor) -> int:
        """Number of the process that updates a parameter (of any shape)."""
        return self._owners[id(parameter)]

    @torch.no_grad()
    def spread(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy the parameters from their owners to all processes, which call this with the same ones."""
        groups: dict[tuple[int, torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in parameters:
            groups.setdefault((self.owner(parameter), parameter.dtype, parameter.device), []).append(parameter)
        sent = []
        for (owner, _, _), members in groups.items():
            flat = torch.cat([parameter.flatten() for parameter in members])
            sent.append((owner, members, flat, dist.broadcast(flat, owner, async_op=True)))
        for owner, members, flat, work in sent:
            work.wait()
            for parameter, values in zip(members, flat.split([p.numel() for p in members]), strict=True):
                if owner != ranks.rank():
                    parameter.copy_(values.view(parameter.shape))

    def whole_state(self, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
        """The `optimiser_tensors` of an unshared optimiser, in the first process; in the others none."""
        own = {name: tensor.cpu() for name, tensor in optimiser_tensors(optimiser).items()}
        found: list[dict[str, Tensor]] | None = [{}] * ranks.count() if ranks.first() else None
        dist.gather_object(own, found)
        return {name: tensor for each in found or () for name, tensor in each.items()}
