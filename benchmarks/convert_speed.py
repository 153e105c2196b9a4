"""Speed of converted models on a CPU: what share of the saved FLOPs is saved time.

    python -m benchmarks.convert_speed [MODEL ...] [--batch 1 8 32] [--rounds 9] [--threads 1] [--cpu-time]
                                       [--out FILE.jsonl]
    python -m benchmarks.convert_speed --show FILE.jsonl

Each model, frozen (`den_kernels.freeze`), is timed in turns with the same model in plain PyTorch, batch norms folded,
in the faster of both memory formats. Images of a batch are at levels drawn evenly in every block. `realised` is the
time that the dense model would take for the FLOPs that are left, divided by ours: 1 is all that can be saved, more than
the share of FLOPs left means faster than dense; `unfrozen` is that of the converted model as it is. Models of
torchvision and timm are measured where these are installed. `--show` prints a file of `--out` as a Markdown table.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import den_kernels
from den.support.heap import keep_allocations_on_the_heap
from den_kernels.convert.frozen import FrozenBlock
from den_kernels.convert.pair import FrozenPair

MODELS = {
    "torchvision/resnet18": 224,
    "torchvision/resnet50": 224,
    "pytorchcv/resnet20_cifar10": 32,
    "pytorchcv/resnet56_cifar10": 32,
    "pytorchcv/wrn16_10_cifar10": 32,
    "pytorchcv/resnext29_32x4d_cifar10": 32,
    "torchvision/mobilenet_v2": 224,
    "torchvision/efficientnet_b0": 224,
    "torchvision/convnext_tiny": 224,
}  # the side of the images of each
GROUPS = 4


def build(name: str) -> nn.Module:
    """The model of a name PACKAGE/MODEL, with random weights, in evaluation mode."""
    package, _, model = name.partition("/")
    if package == "torchvision":
        made = getattr(import_module("torchvision.models"), model)()
    elif package == "timm":
        made = import_module("timm").create_model(model)
    else:
        made = import_module("pytorchcv.model_provider").get_model(model, pretrained=False)
    return made.eval()


def flops(model: nn.Module, x: Tensor) -> int:
    """Twice the multiply-adds of `model(x)`, of the channel groups in use."""
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def levels_of(batch: int, lowest: Sequence[int], seed: int = 0) -> Tensor:
    """Levels [B, N], each block's drawn evenly from those it has."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(low, GROUPS + 1, (batch,), generator=generator) for low in lowest]
    return torch.stack(columns, 1)


def dense_ways(model: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    """The model in plain PyTorch, its norms folded, in both memory formats."""
    folded = fuse(copy.deepcopy(model)) if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) else model
    last = copy.deepcopy(folded).to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    return {"contiguous": lambda: folded(x), "channels-last": lambda: last(x_last)}


def medians(ways: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of a call of each way by `clock`, all timed in turns."""
    for call in ways.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(name: str, batch: int, rounds: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """The times of one model and batch size, and what follows of them."""
    torch.manual_seed(0)
    model = build(name)
    x = torch.randn(batch, 3, MODELS.get(name, 224), MODELS.get(name, 224))
    ways = dense_ways(model, x)
    report = den_kernels.convert(model, GROUPS, example=x[:1])
    own = levels_of(batch, report.lowest)
    with den_kernels.levels(model, torch.full_like(own, GROUPS)):
        whole = flops(model, x)
    with den_kernels.levels(model, own):
        share = flops(model, x) / whole
    frozen = den_kernels.freeze(model, x[:1])
    model.to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)

    def at_levels(run: nn.Module) -> Callable[[], Any]:
        def call() -> None:
            with den_kernels.levels(run, own):
                run(x_last)

        return call

    seconds = medians({**ways, "converted": at_levels(model), "elastic": at_levels(frozen)}, rounds, clock)
    dense = min(seconds["contiguous"], seconds["channels-last"])
    return {
        "model": name,
        "batch": batch,
        "blocks": len(report),
        "fused": sum(isinstance(m, (FrozenBlock, FrozenPair)) for m in frozen.modules()),
        "flops": share,
        "milliseconds": {key: 1e3 * value for key, value in seconds.items()},
        "speed": dense / seconds["elastic"],
        "realised unfrozen": dense * share / seconds["converted"],
        "realised": dense * share / seconds["elastic"],
    }


def table(lines: Iterable[str]) -> str:
    """Lines of JSON, as `--out` writes them, as a Markdown table.

    >>> row = {"model": "a/b", "batch": 8, "fused": 2, "blocks": 3, "flops": 0.5, "speed": 1.5, "realised": 0.75}
    >>> print(table([json.dumps(row | {"realised unfrozen": 0.6})]))
    | model | B | one op | FLOPs left | speed | realised | unfrozen |
    |---|--:|--:|--:|--:|--:|--:|
    | a/b | 8 | 2 of 3 | 0.50 | 1.50 | 0.75 | 0.60 |
    """
    made = ["| model | B | one op | FLOPs left | speed | realised | unfrozen |", "|---|--:|--:|--:|--:|--:|--:|"]
    for row in map(json.loads, lines):
        numbers = " | ".join(f"{row[key]:.2f}" for key in ("flops", "speed", "realised", "realised unfrozen"))
        made.append(f"| {row['model']} | {row['batch']} | {row['fused']} of {row['blocks']} | {numbers} |")
    return "\n".join(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, for a machine that is not quiet")
    parser.add_argument("--out", help="file that a line of JSON is added to for each case")
    parser.add_argument("--show", help="file of --out to print as a table; nothing is measured")
    options = parser.parse_args()
    run = {"threads": options.threads, "torch": torch.__version__, "clock": "CPU time" if options.cpu_time else "time"}
    if options.show:
        print(table(Path(options.show).read_text(encoding="utf-8").splitlines()))
        return
    torch.set_num_threads(options.threads)
    keep_allocations_on_the_heap()
    print(
        f"{'model':34}{'B':>4}{'fused':>8}{'FLOPs':>7}{'dense ms':>10}{'ours ms':>10}{'speed':>7}{'realised':>10}"
        f"{'unfrozen':>10}"
    )
    cases = [(name, batch) for name in options.models for batch in options.batch]
    with torch.inference_mode():
        for name, batch in tqdm(cases, leave=False, disable=len(cases) == 1):
            try:
                row = measure(name, batch, options.rounds, time.process_time if options.cpu_time else time.perf_counter)
            except (ImportError, RuntimeError) as why:  # RuntimeError: a torchvision of another torch
                tqdm.write(f"{name}: not measured: {why}")
                continue
            own, dense = row["milliseconds"]["elastic"], row["milliseconds"]["elastic"] * row["speed"]
            fused = f"{row['fused']}/{row['blocks']}"
            tqdm.write(
                f"{name:34}{batch:4}{fused:>8}{row['flops']:7.2f}{dense:10.2f}{own:10.2f}"
                f"{row['speed']:6.2f}x{row['realised']:10.2f}{row['realised unfrozen']:10.2f}"
            )
            if options.out:
                with open(options.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps({**row, **run}) + "\n")


if __name__ == "__main__":
    main()
