"""How many kernels a network launches on a GPU at inference, counted on the simulated one."""

from collections import Counter

import pytest
import torch

from den import DeepElasticNetwork, ModelConfig, Task

pytest.importorskip("triton", reason="triton is not installed")

from tests.gpu_launches import counted, on_gpu

TASK = Task("photos", 10, 8)


def network(backbone: str, **changes) -> DeepElasticNetwork:
    torch.manual_seed(0)
    config = ModelConfig((TASK,), backbone=backbone, levels=4, trunk_size=8, **changes)
    return DeepElasticNetwork(config).to(torch.bfloat16).eval()


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["wrn14_1", "wrn32_4"])
def test_a_block_is_two_launches_and_no_pass_activates(backbone, monkeypatch):
    model = network(backbone)
    x, levels = torch.randn(3, *TASK.shape).bfloat16(), torch.randint(4, (3, model.num_blocks))
    with counted(monkeypatch) as launches:
        model.to("cuda:0")
        x, levels = on_gpu(x, levels)
        model.estimator(x, TASK, levels)  # folds
        names = Counter(launches.of(lambda: model.estimator(x, TASK, levels)))
    assert "activate_kernel" not in names
    assert names["convolve_kernel"] + names["box_kernel"] == 2 * model.num_blocks
    assert names["pool_kernel"] == 1
    assert names.total() <= 2 * model.num_blocks + 6
