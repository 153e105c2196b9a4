"""A network of dynamic layers, compiled ahead of time: one package, any levels."""

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


@pytest.mark.slow
@torch.no_grad()
def test_a_package_runs_with_other_levels_than_it_was_made_with(tmp_path):
    block, x, levels = Block().eval(), torch.randn(4, 16, 8, 8), torch.tensor([0, 1, 2, 3])
    exported = torch.export.export(block, (x, levels))
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "block.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for other in (levels, levels.flip(0), torch.tensor([3, 0, 0, 3])):
        torch.testing.assert_close(package(x, other), block(x, other), rtol=1e-5, atol=1e-5)
