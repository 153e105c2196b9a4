"""The demonstration: a dense network and a Deep Elastic Network on real images, side by side."""

import time
from dataclasses import replace
from pathlib import Path

import torch

from den.data import load_set
from den.evaluate.comparison import NOTES, check_lines, checks, compare, remarks, table, write_json
from den.nn.model import DeepElasticNetwork
from den.recipes.den import train
from den.report.figures.comparison import draw_all
from den.support.call_time import keep_allocations_on_the_heap
from den.support.files import check_folder, check_own, write_text
from den.support.limits import check_ranges
from den.train.config import (
    DataConfig,
    DemoConfig,
    EstimatorTraining,
    NetworkConfig,
    PhaseConfig,
    SelectorTraining,
    TrainConfig,
)

LEAST_ACCURACY = {"digits": 0.98, "fashion": 0.87}


def main(config: DemoConfig) -> None:
    """Train both networks, or go on with them, then compare them: a table, figures, results.json.

    Everything lies in `config.out` (a quick run: in its folder "quick").  A run that was interrupted continues from its
    last checkpoint, a finished one is only measured.

    Raises ValueError for a folder that cannot be written or holds runs of other settings.
    """
    check_ranges(config, "demo")
    keep_allocations_on_the_heap()
    start = time.perf_counter()
    folder = config.out / "quick" if config.quick else config.out
    check_folder(folder, "demo: out")
    check_own(folder / "results.json", '"quick"', "demo: out")
    print(_greeting(config, folder), flush=True)
    networks = train_both(config)
    print("\n3. Comparison on the test images", flush=True)
    sets = [load_set(name, "test") for name in LEAST_ACCURACY]
    near, spread = (12, 8) if config.quick else (40, 30)
    found = compare(networks["dense"], networks["den"], sets, near, spread)
    lines = checks(found, LEAST_ACCURACY)
    text = f"{table(found)}\n\n{NOTES}\n{training_note(config)}\n\n" + "\n".join(remarks(found)) + "\n"
    if config.quick:
        text += "\nThis was the quick schedule: it shows that everything runs; its numbers are not the promise.\n"
    else:
        text += f"\nWhat this is to show:\n{check_lines(lines)}\n"
    seconds = time.perf_counter() - start
    write_text(folder / "table.txt", text)
    write_json(folder / "results.json", found, {"quick": config.quick, "seed": config.seed, "seconds": seconds})
    figures = draw_all(found, networks["den"], folder)
    print("\n" + text, flush=True)
    seconds = time.perf_counter() - start
    print(f"Figures and results ({seconds / 60:.1f} minutes in all): {folder}/")
    for path in figures:
        print(f"  {path.name}")


def _greeting(config: DemoConfig, folder: Path) -> str:
    length = "about a minute" if config.quick else "under 8 minutes on 2 cores"
    return (
        "Deep Elastic Network: handwritten digits (8x8) and fashion (28x28) in one network of elastic blocks;"
        " a selector\nchooses for every image how much of each block to use.  Beside it, the same network, dense."
        f"\n{torch.get_num_threads()} threads, {length}; runs and figures go to {folder}/"
    )


def training_note(config: DemoConfig) -> str:
    """A sentence on the number of updates that each estimator had."""
    dense, elastic = (run.estimator for run in schedule(config).values())
    return (
        f"The dense network had {dense.first.steps:,} updates, the elastic one {elastic.first.steps:,} on random"
        f" structures and {elastic.finish.steps:,} on chosen ones:\nabout the same FLOPs in training, at the structures"
        " of these updates."
    )


def train_both(config: DemoConfig) -> dict[str, DeepElasticNetwork]:
    """The trained networks by their mode, "dense" and "den"; runs that exist already are continued."""
    networks: dict[str, DeepElasticNetwork] = {}
    for title, run in schedule(config).items():
        resume = (run.out / "last.safetensors").exists()
        print(f"\n{title}{' (continued)' if resume else ''}", flush=True)
        networks[run.mode] = train(run, resume=resume)
    return networks


def schedule(config: DemoConfig) -> dict[str, TrainConfig]:
    """The two runs by their titles: one network, data, rate, and as many FLOPs to train the estimator.

    An update at half of the FLOPs costs half of them, so that the elastic estimator has 2,370 updates where the dense
    one has 1,300.  Equation 8 with tau = 0.25 (the paper has 0.75): in so few steps the small structures need the
    larger share.  One stage and then the estimator's finish on the likeliest structures: in a second stage the selector
    would find those that it chose before better trained than the rest, and settle on two of them.  Most updates go to
    the finish.
    A budget steers both tasks to about 1.83 times fewer FLOPs: under one rho, digits take more than fashion.  The first
    phase must be long enough to learn digits: while their losses are high, their selector soon settles on few and wide
    structures, which no rho moves again.
    """
    folder = config.out / "quick" if config.quick else config.out
    dense, first, choose, finish = (100, 100, 80, 60) if config.quick else (1300, 420, 350, 1950)
    elastic = TrainConfig(
        out=folder / "den",
        seed=config.seed,
        stages=1,
        epoch_steps=150,
        data=DataConfig(tasks=tuple(LEAST_ACCURACY), shares=(1.0, 5.0), batch_size=128, validation=0.02),
        network=NetworkConfig(
            backbone="wrn", stages=((32, 1), (64, 2), (128, 3)), stem=16, trunk_size=16, selector_channels=(16, 32, 64)
        ),
        estimator=EstimatorTraining(
            first=PhaseConfig(first, rate=0.1),
            finish=PhaseConfig(finish, rate=0.1),
            weight_decay=5e-4,
            tau=0.25,
            initial_share=0.04,
            structures="argmax",
        ),
        selector=SelectorTraining(phase=PhaseConfig(choose, rate=3e-3), rho=0.2, budget=0.545, entropy_bonus=0.05),
    )
    alone = replace(elastic.estimator, first=PhaseConfig(dense, rate=0.1))
    return {
        "1. Dense baseline": replace(elastic, out=folder / "dense", mode="dense", estimator=alone),
        "2. Deep Elastic Network (Algorithm 1)": elastic,
    }
