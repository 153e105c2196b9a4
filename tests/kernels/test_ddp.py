"""Dynamic layers under DistributedDataParallel: gradients of two processes are those of one on the joined batch.

Run as a file, it is one of those processes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from den_kernels import DynamicBatchNorm2d, DynamicConv2d

GROUPS = (4, 4, 8)


class Block(nn.Module):
    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.conv1 = DynamicConv2d(8, 16, 3, padding=1, out_groups=GROUPS)
        self.norm = DynamicBatchNorm2d(16, groups=GROUPS, process_group=process_group)
        self.conv2 = DynamicConv2d(16, 8, 3, padding=1, in_groups=GROUPS)

    def forward(self, x: Tensor, levels: Tensor) -> Tensor:
        return x + self.conv2(self.norm(self.conv1(x, levels), levels, relu=True), levels)


def work(rank: int, size: int, folder: Path, device: str) -> None:
    """One process: two steps, because the reducer learns the order of the gradients in the first."""
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=size)
    batch = torch.load(folder / f"batch{rank}.pt", map_location=device)
    block = Block(dist.group.WORLD)
    block.load_state_dict(torch.load(folder / "weights.pt"))
    model = DistributedDataParallel(block.to(device))
    for _ in range(2):
        model.zero_grad()
        model(batch["x"], batch["levels"]).backward(batch["dy"])
    torch.save({name: p.grad.cpu() for name, p in block.named_parameters()}, folder / f"made{rank}.pt")
    dist.barrier()
    os._exit(0)  # no interpreter shutdown: threads of gloo that still wait for the GIL then would abort the process


def run(folder: Path, parts: list[slice], device: str) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Gradients of every process, and those of one process on the whole batch."""
    x, dy = torch.randn(2, 8, 8, 5, 5).unbind()
    levels, block = torch.tensor([1, 0, 2, 2, 1, 2, 0, 3]), Block()  # the last group is used by one instance alone
    torch.save(block.state_dict(), folder / "weights.pt")
    for rank, part in enumerate(parts):
        batch = {"x": x[part].clone(), "dy": dy[part].clone(), "levels": levels[part].clone()}
        torch.save(batch, folder / f"batch{rank}.pt")
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(len(parts)), str(folder), device],
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(len(parts))
    ]  # fmt: skip
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(parts), errors
    block(x, levels).backward(dy)
    whole = {name: parameter.grad for name, parameter in block.named_parameters()}
    return [torch.load(folder / f"made{rank}.pt") for rank in range(len(parts))], whole


@pytest.mark.slow
def test_two_processes(tmp_path):
    made, whole = run(tmp_path, [slice(0, 3), slice(3, 8)], "cpu")
    for name, gradient in whole.items():
        assert torch.equal(made[0][name], made[1][name])
        torch.testing.assert_close(made[0][name] * 2, gradient, rtol=1e-4, atol=1e-5)  # DDP takes the mean


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_process_on_a_gpu(tmp_path):
    (made,), whole = run(tmp_path, [slice(0, 8)], "cuda:0")
    for name, gradient in whole.items():
        torch.testing.assert_close(made[name], gradient, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
