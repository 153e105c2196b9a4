"""Batch norm statistics shared by processes: sums, counts and gradients."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from den_kernels import DynamicBatchNorm2d

WORKER = """
import os, sys, torch, torch.distributed as dist
from den_kernels import DynamicBatchNorm2d
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
batch = torch.load(f"{folder}/batch{rank}.pt")
norm = DynamicBatchNorm2d(16, groups=(4, 4, 8), process_group=dist.group.WORLD if sys.argv[3] == "given" else None)
if sys.argv[3] == "converted":
    norm = torch.nn.SyncBatchNorm.convert_sync_batchnorm(norm)
x = batch["x"].requires_grad_()
y = norm(x, batch["levels"], relu=True)
y.backward(batch["dy"])
made = {"y": y.detach(), "dx": x.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad}
torch.save({**made, "mean": norm.running_mean, "var": norm.running_var}, f"{folder}/made{rank}.pt")
dist.barrier()
os._exit(0)  # no interpreter shutdown: threads of gloo that still wait for the GIL then would abort the process
"""


@pytest.mark.parametrize("way", ["given", "converted"])
def test_two_processes_equal_one_on_the_joined_batch(tmp_path: Path, way: str) -> None:
    x, dy = torch.randn(2, 8, 16, 5, 5).unbind()
    levels = torch.tensor([1, 0, 2, 3, 1, 2, 0, 1])  # the last group is used in the second process alone
    for rank, part in enumerate((slice(0, 3), slice(3, 8))):
        torch.save({"x": x[part].clone(), "dy": dy[part].clone(), "levels": levels[part]}, tmp_path / f"batch{rank}.pt")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path), way], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    made = [torch.load(tmp_path / f"made{rank}.pt") for rank in range(2)]

    norm, leaf = DynamicBatchNorm2d(16, groups=(4, 4, 8)), x.requires_grad_()
    y = norm(leaf, levels, relu=True)
    y.backward(dy)
    for name, joined in (("y", y.detach()), ("dx", leaf.grad)):
        torch.testing.assert_close(torch.cat([part[name] for part in made]), joined, rtol=1e-4, atol=1e-5)
    for name, joined in (("dweight", norm.weight.grad), ("dbias", norm.bias.grad)):
        torch.testing.assert_close(made[0][name] + made[1][name], joined, rtol=1e-4, atol=1e-5)
    for part in made:
        torch.testing.assert_close(part["mean"], norm.running_mean)
        torch.testing.assert_close(part["var"], norm.running_var)
