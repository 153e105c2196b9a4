"""A network of dynamic layers through Inductor: compiled ahead of time, and as one graph in its most ambitious mode."""

import pytest
import torch
from torch import Tensor, nn

from den_kernels import DynamicBatchNorm2d, DynamicConv2d, RoutingPlan

GROUPS = (8, 8, 16)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = DynamicConv2d(16, 32, 3, padding=1, out_groups=GROUPS)
        self.norm = DynamicBatchNorm2d(32, groups=GROUPS)
        self.conv2 = DynamicConv2d(32, 16, 3, padding=1, in_groups=GROUPS)

    def forward(self, x: Tensor, levels: Tensor) -> Tensor:
        route = RoutingPlan.from_levels(levels[:, None], groups=3)[0]
        return x + self.conv2(self.norm(self.conv1(x, route), route, relu=True), route)


@pytest.mark.release
@torch.no_grad()
def test_a_package_runs_with_other_levels_than_it_was_made_with(tmp_path):
    block, x, levels = Block().eval(), torch.randn(4, 16, 8, 8), torch.tensor([0, 1, 2, 3])
    exported = torch.export.export(block, (x, levels))
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "block.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for other in (levels, levels.flip(0), torch.tensor([3, 0, 0, 3])):
        torch.testing.assert_close(package(x, other), block(x, other), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_one_graph_with_max_autotune_trains_with_any_levels():
    block = Block().train()
    compiled = torch.compile(block, fullgraph=True, mode="max-autotune")
    for levels in (torch.tensor([0, 1, 2, 3]), torch.tensor([3, 3, 0, 2])):
        results = []
        for function in (block, compiled):
            block.norm.reset_running_stats()
            x = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
            y = function(x, levels)
            results.append([y, *torch.autograd.grad(y.square().mean(), [x, *block.parameters()])])
            results[-1].append(block.norm.running_var.clone())
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-5)
