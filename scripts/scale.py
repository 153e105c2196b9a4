#!/usr/bin/env python3
"""Predicts what a training step costs on 8 to 512 GPUs; no GPU is measured.

    scripts/scale.py [--write]

The messages of a step are recorded on this machine's CPU: the real network, its shared batch norms and its gradient
means run in a process group that sends nothing.  A simulation then lets G processes make the step, each with images
whose structures are drawn, on a machine that `Machine` describes: a message that the step needs at once (a batch norm)
waits for the slowest process, a message of gradients goes along with the rest of the backward pass.  --write puts the
tables into docs/scale.md.
"""

import argparse
import dataclasses
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from den.dag.losses import task_loss
from den.dag.model_config import DagConfig
from den.dag.network import DagNetwork
from den.data import Batch
from den.nn.count import count_flops
from den.nn.model import create_model
from den.nn.tasks import Task
from den.support.tables import write_section
from den.train.gradients import GradientMeans, share_statistics
from den.train.objective import initial_structures, instance_losses

PAGE = Path(__file__).resolve().parents[1] / "docs/scale.md"
GPUS = (1, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Machine:
    """Assumptions about the machine: none of them was measured."""

    rate: float = 60e12  # FLOP/s that convolutions of these sizes reach in bfloat16
    dispatch: float = 5e-6  # seconds of the host for each operation; a step is not shorter than all of them
    node: int = 8  # GPUs of a node
    near: float = 20e-6  # seconds that the smallest all-reduce within a node takes
    hop: float = 6e-6  # seconds more for each doubling of the nodes
    near_rate: float = 200e9  # bytes/s of an all-reduce within a node
    far_rate: float = 40e9  # bytes/s of an all-reduce between nodes, of each GPU's link
    turns: int = 20  # simulated steps, over which is averaged

    def all_reduce(self, size: float, gpus: int) -> float:
        """Seconds of an all-reduce of so many bytes."""
        if gpus == 1:
            return 0.0
        nodes = -(-gpus // self.node)
        latency = self.near + self.hop * (math.ceil(math.log2(nodes)) if nodes > 1 else 0)
        return latency + 2 * size / (self.near_rate if nodes == 1 else self.far_rate)


@dataclass(frozen=True)
class Message:
    """An all-reduce: its bytes, the share of the step's work before it, and whether the step waits for it there."""

    size: int
    at: float
    waits: bool


@dataclass(frozen=True)
class Step:
    """A recorded training step."""

    name: str
    messages: tuple[Message, ...]
    flops: float  # of an image, forward and backward
    operations: int  # that the host dispatches
    spread: float  # standard deviation of an image's FLOPs over their mean
    images: int  # of the recorded batch
    seconds: float  # that it took on this machine's CPU

    def sizes(self, waits: bool) -> list[int]:
        return [message.size for message in self.messages if message.waits == waits]


def record(name: str, model: nn.Module, loss: Callable[[], torch.Tensor], images: int, spread: float) -> Step:
    """Make two steps of a model on a group of processes that sends nothing, and record the second."""
    share_statistics(model)
    means = GradientMeans([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    sent: list[tuple[int, float, bool]] = []
    plain, begun = dist.all_reduce, 0.0

    def all_reduce(values: torch.Tensor, *arguments: Any, async_op: bool = False, **options: Any) -> Any:
        sent.append((values.nbytes, time.perf_counter() - begun, not async_op))
        return plain(values, *arguments, async_op=async_op, **options)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        with means.taken():
            loss().backward()

    with mock.patch.object(dist, "all_reduce", all_reduce):
        with Operations() as operations, FlopCounterMode(display=False) as flops:
            step()
        sent.clear()
        begun = time.perf_counter()
        step()
        seconds = time.perf_counter() - begun
    messages = tuple(Message(size, at / seconds, waits) for size, at, waits in sent)
    return Step(name, messages, flops.get_total_flops() / images, operations.count, spread, images, seconds)


class Operations(TorchDispatchMode):
    """Counts the operations that the host dispatches."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def simulate(step: Step, images: int, gpus: int, machine: Machine) -> dict[str, float]:
    """Mean seconds of a step of `images` images on each of so many GPUs, and of what they consist.

    Returns:
        "work", what the mean process computes; "uneven", that the slowest one computes more; "norms" and "gradients",
        waiting for messages; "step", all of them.
    """
    generator, found = random.Random(gpus), {"work": 0.0, "uneven": 0.0, "norms": 0.0, "gradients": 0.0}
    floor, mean = step.operations * machine.dispatch, images * step.flops / machine.rate
    for _ in range(machine.turns):
        draws = [generator.gauss(1, step.spread / math.sqrt(images)) for _ in range(gpus)]
        works = [max(floor, mean * draw) for draw in draws]
        work, slowest = sum(works) / gpus, max(works)
        now, done, norms, free = 0.0, 0.0, 0.0, 0.0  # time, share of the work, waited, when the network is free
        for message in step.messages:
            now, done = now + (message.at - done) * slowest, message.at
            free = max(now, free) + machine.all_reduce(message.size, gpus)
            if message.waits:
                norms, now = norms + free - now, free
        now += (1 - done) * slowest
        parts = {"work": work, "uneven": slowest - work, "norms": norms, "gradients": max(0.0, free - now)}
        found = {name: found[name] + part / machine.turns for name, part in parts.items()}
    return {**found, "step": sum(found.values())}


def elastic(backbone: str = "wrn32_4", size: int = 32, count: int = 8) -> Step:
    """A step of Algorithm 1's estimator, on structures of equation 8."""
    tasks = [Task("a", 10, size), Task("b", 100, size)]
    model, generator = create_model(backbone, tasks), torch.Generator().manual_seed(0)
    images = [torch.randn(count // 2, 3, size, size).contiguous(memory_format=torch.channels_last) for _ in tasks]
    labels = [torch.randint(10, (count // 2,)) for _ in tasks]
    structures = initial_structures(count, model.num_blocks, model.levels, 0.75, generator)
    flops = count_flops(model, initial_structures(2000, model.num_blocks, model.levels, 0.75, generator))
    estimator = model.estimator.train()

    def loss() -> torch.Tensor:
        return instance_losses(estimator(images, ["a", "b"], structures), labels).mean()

    return record(f"DEN, {backbone}", estimator, loss, count, float(flops.std() / flops.mean()))


def searched(channels: int = 64, size: tuple[int, int] = (288, 384), count: int = 1) -> Step:
    """A step of the search's weights on NYU-v2: three dense tasks of the same images."""
    kinds = {"segmentation": 40, "depth": 1, "normals": 3}
    tasks = tuple(Task(kind, n, size[0], 3, kind, size[1]) for kind, n in kinds.items())
    trunk = (-(-size[0] // 4), -(-size[1] // 4))
    model = DagNetwork(DagConfig(tasks, channels=channels, trunk_size=trunk)).train()
    images = torch.randn(count, 3, *size).contiguous(memory_format=torch.channels_last)
    targets = [torch.randint(40, (count, *size)), torch.rand(count, 1, *size) + 1, torch.randn(count, 3, *size)]
    batch = Batch(tuple(kinds), [images] * 3, targets)
    return record("DAG, NYU-v2", model, lambda: task_loss(model, batch)[0], count, 0.0)


def tables(steps: dict[Step, tuple[int, ...]], machine: Machine) -> str:
    """The messages of each step, the assumptions, and the predicted costs, in Markdown.

    steps: with each, the numbers of images on a GPU.
    """
    columns = "norms: messages | bytes | gradients: messages | bytes | FLOPs an image | operations | CPU, measured"
    lines = [f"| step | {columns} |", "|---|" + "--:|" * 7]
    for step in steps:
        norms, gradients = step.sizes(True), step.sizes(False)
        lines.append(
            f"| {step.name} | {len(norms)} | {sum(norms):,} | {len(gradients)} | {sum(gradients):,} |"
            f" {step.flops / 1e9:.2f} G | {step.operations:,} | {step.seconds:.2f} s for {step.images} |"
        )
    lines += ["", "Assumptions:", "", "| assumption | value |", "|---|--:|"]
    lines += [f"| `{field.name}` | {getattr(machine, field.name):g} |" for field in dataclasses.fields(machine)]
    for step, count in ((step, count) for step, counts in steps.items() for count in counts):
        lines += ["", f"**{step.name}**, {count} images on each GPU, milliseconds, all predicted:", ""]
        lines += ["| GPUs | step | work | uneven | norms | gradients | images/s | of ideal |", "|--:|" + "--:|" * 7]
        alone = simulate(step, count, 1, machine)["step"]
        for gpus in GPUS:
            cost = simulate(step, count, gpus, machine)
            shown = " | ".join(
                f"{1e3 * abs(cost[name]):.1f}" for name in ("step", "work", "uneven", "norms", "gradients")
            )
            lines.append(f"| {gpus} | {shown} | {gpus * count / cost['step']:,.0f} | {alone / cost['step']:.0%} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    options = parser.parse_args()
    torch.manual_seed(0)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=GPUS[-1])
    text = tables({elastic(): (64, 256), searched(): (8,)}, Machine())
    print(text)
    if options.write:
        write_section(PAGE, "scale", text)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
