#!/usr/bin/env python3
"""Counts the functions and files of this project that one image and one training step pass through.

    scripts/hops.py                       the table
    scripts/hops.py --list                also the functions, file by file, in the order of their first calls
    scripts/hops.py --write               the table goes into docs/architecture.md
    scripts/hops.py --backbone wrn32_4    another network (wrn14_1)

A function counts once, however often it is called; comprehensions count as part of the function that they stand in.
Inference is one image of 32x32 pixels, all blocks in use, after two runs that fill the caches. A training step begins
where the update before it ends: the next batch is drawn and augmented, its loss computed and an optimiser stepped.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch

import den
import den_kernels
from den import DeepElasticNetwork, Task, create_model
from den.recipes.den import train
from den.support.tables import markdown_table, write_section
from den.train.config import DataConfig, EstimatorTraining, NetworkConfig, PhaseConfig, SelectorTraining, TrainConfig
from den.train.engine import Engine

FOLDERS = tuple(f"{Path(package.__file__ or '').parent}/" for package in (den, den_kernels))
ROOT = Path(den.__file__ or "").parents[1]
PAGE = Path(__file__).resolve().parents[1] / "docs/architecture.md"
WARM_UP = 2  # calls, or updates of each network, before the one that is counted
Function = tuple[str, str]  # file, qualified name


class Hops:
    """Counts the calls of our functions in this thread from `start` to `stop`.

    Attributes:
        calls: how often each function was called, in the order of the first calls.
    """

    def __init__(self) -> None:
        self.calls: Counter[Function] = Counter()

    def start(self) -> None:
        """Count from here on."""
        sys.setprofile(self._event)

    def stop(self) -> None:
        """Count no more."""
        sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(FOLDERS):
            name = code.co_qualname
            if not name.endswith("comp>") and not name.endswith("<genexpr>"):
                self.calls[str(Path(code.co_filename).relative_to(ROOT)), name] += 1

    @property
    def files(self) -> list[str]:
        """The files that were passed, in the order of the first calls."""
        return list(dict.fromkeys(file for file, _ in self.calls))


def of_inference(backbone: str, frozen: bool) -> Hops:
    """The functions that one image passes in a network of that name."""
    torch.manual_seed(0)
    model = create_model(backbone, [Task("images", 10, 32)], trunk_size=32).eval()
    use_every_block(model)
    if frozen:
        model.freeze()
    image, hops = torch.randn(1, 3, 32, 32), Hops()
    with torch.no_grad():
        for _ in range(WARM_UP):
            model(image, "images")
        hops.start()
        model(image, "images")
        hops.stop()
    return hops


@torch.no_grad()
def use_every_block(model: DeepElasticNetwork) -> None:
    """Let the selector choose the second-highest level of every block: a block at level 0 would be left out."""
    preferred = torch.zeros(model.num_blocks, model.levels)
    preferred[:, -2] = 100
    for bias in (parameter for name, parameter in model.selector.heads.named_parameters() if name.endswith("bias")):
        bias.copy_(preferred.flatten())


def of_steps(backbone: str) -> dict[str, Hops]:
    """The functions that an update of the estimator and one of the selector pass, by the name of the network."""
    steps = PhaseConfig(steps=WARM_UP + 1, rate=0.01)
    found = {"estimator": Hops(), "selector": Hops()}
    ends = iter([(hops, step) for hops in found.values() for step in range(steps.steps)])
    update = Engine.update

    def counted(engine: Any, objective: Any) -> None:
        update(engine, objective)
        hops, step = next(ends)
        hops.stop()
        if step == WARM_UP - 1:
            hops.start()

    with tempfile.TemporaryDirectory() as folder, patch.object(Engine, "update", counted):
        train(TrainConfig(
            out=Path(folder) / "run", stages=1, progress=False, network=NetworkConfig(backbone=backbone),
            data=DataConfig(share=0.1, batch_size=16), estimator=EstimatorTraining(first=steps),
            selector=SelectorTraining(phase=steps),
        ))  # fmt: skip
    return found


def rows(found: dict[str, Hops]) -> Iterator[list[str]]:
    """The rows of the table: a name, the number of functions, of files, and of calls."""
    for name, hops in found.items():
        yield [name, f"{len(hops.calls)}", f"{len(hops.files)}", f"{hops.calls.total():,}"]


def listing(name: str, hops: Hops) -> str:
    """The functions file by file."""
    lines = [f"\n{name}"]
    for file in hops.files:
        lines += [f"  {file}", *(f"    {each} x{count}" for (own, each), count in hops.calls.items() if own == file)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbone", default="wrn14_1", help="name of the network (wrn14_1)")
    parser.add_argument("--list", action="store_true", help="print the functions, file by file")
    parser.add_argument("--write", action="store_true", help="write the table into docs/architecture.md")
    options = parser.parse_args(arguments)
    found = {
        "inference, one image": of_inference(options.backbone, frozen=False),
        "inference, one image, frozen": of_inference(options.backbone, frozen=True),
    }
    found |= {f"training step, {network}": hops for network, hops in of_steps(options.backbone).items()}
    table = markdown_table(["what", "functions", "files", "calls"], list(rows(found)))
    print(table)
    if options.write:
        write_section(PAGE, "hops", table)
    if options.list:
        print(*(listing(name, hops) for name, hops in found.items()), sep="\n")


if __name__ == "__main__":
    main()
