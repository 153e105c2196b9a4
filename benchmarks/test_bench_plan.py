"""The routing plan of all blocks, from levels [B, N] to sorted instances, against a search for each level."""

from typing import Any

import pytest
import torch
from torch import Tensor

from den_kernels import RoutingPlan

from .harness import Case, Expected, Settings, Work, provide, run
from .mixes import mix_structures
from .parameters import checked, everywhere

LEVELS = 4
CASES = [Case("plan", "15-blocks", batch, "random-blocks", "int32") for batch in (1, 64, 1024)]
GPU, TINY = ([Case("plan", "20-blocks", batch, "random-blocks", "int64")] for batch in (1024, 16))


def sorted_instances(levels: Tensor) -> Tensor:
    """int64 [N, B]: for every block the instances, highest level first, in order within a level: plain loops."""
    columns = levels.t().tolist()
    orders = [[b for level in range(LEVELS)[::-1] for b, own in enumerate(c) if own == level] for c in columns]
    return torch.tensor(orders)


def bucketed(levels: Tensor) -> Tensor:
    """Rows [N, B] of a plan of levels [B, N], by bucketing: a comparison and a nonzero for each block and level."""
    blocks = levels.t()
    found = [torch.cat([(c == level).nonzero().flatten() for level in range(LEVELS)[::-1]]) for c in blocks]
    return torch.stack(found)


@pytest.mark.op
@pytest.mark.plan
@pytest.mark.parametrize("case", [*everywhere(CASES), *checked(GPU, TINY)])
def test_plan(benchmark: Any, case: Case, settings: Settings) -> None:
    blocks = int(case.shape.split("-")[0])
    levels = mix_structures(case.mix, torch.ones(blocks, LEVELS), case.batch)
    expected, here = Expected(sorted_instances(levels), 0.0), levels.to(case.device, getattr(torch, case.dtype))
    sets = [here, *(here.roll(i, 0) for i in range(1, 4) if case.device != "cpu")]
    providers = provide({"ours": lambda x: RoutingPlan.from_levels(x, LEVELS - 1).order}, expected, inputs=sets)
    if case.device == "cpu":  # nonzero waits for a GPU, so that no graph can be captured of it
        providers += provide({"bucket": lambda: bucketed(here)}, expected)
    traffic = 3 * here.nbytes  # levels read, levels and order written
    run(benchmark, case, providers, Work(0, 0, traffic), settings)
