"""Record what a trained selector chooses: ``python -m benchmarks.record_levels RUN [--images N]``.

RUN is a run folder of ``den demo`` or ``den train``. The structures of the first test images of each of its tasks go to
``recorded_levels.json``, from where the mixes "recorded-TASK" take them.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from den.data import load_set
from den.evaluate.accuracy import full_flops
from den.nn.count import count_flops
from den.train.checkpoint import load_model
from den.train.folder import stored_config

from .mixes import RECORDED


@torch.inference_mode()
def record(run: Path, images: int) -> dict[str, Any]:
    """The settings that made the network, its shape, and the structures of ``images`` test images of each task."""
    config, model = stored_config(run), load_model(run / "last.safetensors").eval()
    tasks, ratios = {}, {}
    for name in config.data.tasks:
        image_set = load_set(name, "test", config.data.root)
        levels = model.select(image_set.inputs(slice(0, images)), name)
        tasks[name] = ["".join(map(str, row)) for row in levels.tolist()]
        ratios[name] = round(full_flops(model) / count_flops(model, levels).mean().item(), 3)
    estimator, phase = config.estimator, config.selector.phase
    steps = {"first": estimator.first.steps, "selector": phase.steps, "finish": estimator.finish.steps}
    return {"steps": steps, "seed": config.seed, "flops_ratios": ratios, "tasks": tasks}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record_levels", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--images", type=int, default=256, help="test images of each task (default 256)")
    parser.add_argument("--out", type=Path, default=RECORDED, help="the file to write")
    options = parser.parse_args(arguments)
    try:
        found = record(options.run, options.images)
    except (OSError, ValueError) as error:
        print(f"record_levels: {error}", file=sys.stderr)
        return 1
    options.out.write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(f"{options.out}: {found['flops_ratios']} times fewer FLOPs, steps {found['steps']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
