"""Speed of converted models on a CPU: what share of the saved FLOPs is saved time.

    python -m benchmarks.convert_speed [MODEL ...] [--batch 1 8 32] [--rounds 9] [--threads 1] [--cpu-time]
                                       [--out FILE.jsonl]
    python -m benchmarks.convert_speed --show FILE.jsonl

Each model, frozen (`den_kernels.freeze`), is timed in turns with the same dense model, batch norms folded: in plain
PyTorch, in the faster of both memory formats, and on OpenVINO and ONNX Runtime where these are installed (the extra
`peers`). Images of a batch are at levels drawn evenly in every block. `realised` is the time that the dense model would
take in PyTorch for the FLOPs that are left, divided by ours: 1 is all that can be saved, more than the share of FLOPs
left means faster than dense; `unfrozen` is that of the converted model as it is, and the columns of the engines have
that of the frozen one against them. A row is written only if all ways of the dense model agree, and both of the
converted one. Models whose package is missing are named and left out. `--show` prints a file of `--out` as a table.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import den_kernels
from benchmarks import engines, packages
from den.support.call_time import keep_allocations_on_the_heap
from den.support.tables import markdown_table
from den_kernels.convert.fold import fold_norms
from den_kernels.convert.frozen import FrozenBlock
from den_kernels.convert.pair import FrozenPair
from den_kernels.convert.record import record

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
    "transformers/resnet-50": 224,
    "timm/resnet50": 224,
    "timm/efficientnet_b0": 224,
}  # the side of the images of each
GROUPS = 4
ENGINES = tuple(name.removeprefix("dense-") for name in engines.ENGINES)
TOLERANCE = 1e-3  # of the largest logit, between two ways


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


Way = Callable[[], Tensor]


def folded(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy of a plain model whose batch norms are folded into the convolutions before them."""
    made = copy.deepcopy(model)
    fold_norms(made, record(made, (x,)), [])
    return made


def dense_ways(model: nn.Module, x: Tensor) -> dict[str, Way]:
    """The model with folded norms in plain PyTorch, in both memory formats, and on each engine that is installed."""
    plain = folded(model, x[:1])
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    ways: dict[str, Way] = {"contiguous": lambda: plain(x), "channels-last": lambda: last(x_last)}
    names = engines.installed()
    exported = engines.exported(plain, x) if names else b""
    for name in names:
        engine = engines.ENGINES[name](exported, x, torch.float32, torch.get_num_threads())
        ways[name.removeprefix("dense-")] = engine
    return ways


def medians(ways: dict[str, Way], rounds: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Median seconds of a call of each way by `clock`, all timed in turns; after one call of each."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, call in ways.items():
            if torch.get_num_threads() > 1:
                time.sleep(0.02)  # the threads of the runtime before it wait for work in a loop
            start = clock()
            call()
            if turn:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@dataclass(frozen=True)
class Case:
    """A model in all its ways, ready to be timed."""

    facts: dict[str, Any]
    flops: float
    """The share of the dense model's FLOPs that is left at the levels."""
    dense: dict[str, Way]
    elastic: dict[str, Way]
    """The converted model as it is, and frozen."""

    @classmethod
    @torch.no_grad()  # parameters made in inference mode carry no version, and are folded anew in each call
    def of(cls, name: str, batch: int) -> "Case":
        """The model PACKAGE/MODEL with random weights, for a batch. Raises RuntimeError where two ways disagree."""
        torch.manual_seed(0)
        model = packages.build(name).eval()
        x = torch.randn(batch, 3, MODELS.get(name, 224), MODELS.get(name, 224))
        dense, wanted = dense_ways(model, x), model(x)
        report = den_kernels.convert(model, GROUPS, example=x[:1])
        own = levels_of(batch, report.lowest)
        with den_kernels.levels(model, torch.full_like(own, GROUPS)):
            whole = flops(model, x)
        with den_kernels.levels(model, own):
            share = flops(model, x) / whole
        frozen = den_kernels.freeze(model, x[:1])
        model.to(memory_format=torch.channels_last)
        x_last = x.contiguous(memory_format=torch.channels_last)

        def at_levels(run: nn.Module) -> Way:
            def call() -> Tensor:
                with den_kernels.levels(run, own):
                    return run(x_last)

            return call

        elastic = {"converted": at_levels(model), "elastic": at_levels(frozen)}
        for way, call in (*dense.items(), *elastic.items()):
            like = wanted if way in dense else elastic["converted"]()
            if (error := float((call() - like).abs().max() / like.abs().max())) > TOLERANCE:
                raise RuntimeError(f"{way} is off by {error:.1e} of the largest logit")
        fused = sum(isinstance(m, (FrozenBlock, FrozenPair)) for m in frozen.modules())
        facts = {"model": name, "batch": batch, "blocks": len(report), "fused": fused}
        return cls(facts, share, dense, elastic)

    def measured(self, rounds: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
        """The row of the case: median times, and what follows of them."""
        with torch.inference_mode():
            seconds = medians({**self.dense, **self.elastic}, rounds, clock)
        dense = min(seconds["contiguous"], seconds["channels-last"])
        against = {name: seconds[name] * self.flops / seconds["elastic"] for name in ENGINES if name in seconds}
        return {
            **self.facts,
            "flops": self.flops,
            "milliseconds": {key: 1e3 * value for key, value in seconds.items()},
            "speed": dense / seconds["elastic"],
            "realised": dense * self.flops / seconds["elastic"],
            "realised unfrozen": dense * self.flops / seconds["converted"],
            **{f"realised {name}": value for name, value in against.items()},
        }


COLUMNS = ("flops", "speed", "realised", *(f"realised {name}" for name in ENGINES), "realised unfrozen")
HEADS = ("FLOPs left", "speed", "realised", *ENGINES, "unfrozen")


def numbers_of(row: dict[str, Any]) -> list[str]:
    """The numbers of a row in the order of `HEADS`; empty where an engine was not there."""
    return [f"{row[key]:.2f}" if key in row else "" for key in COLUMNS]


def table(lines: Iterable[str]) -> str:
    """Lines of JSON, as `--out` writes them, as a Markdown table.

    >>> row = {"model": "a/b", "batch": 8, "fused": 2, "blocks": 3, "flops": 0.5, "speed": 1.5, "realised": 0.75}
    >>> print(table([json.dumps(row | {"realised openvino": 0.5, "realised unfrozen": 0.6})]))
    | model | B | one op | FLOPs left | speed | realised | openvino | onnxruntime | unfrozen |
    |-------|--:|-------:|-----------:|------:|---------:|---------:|------------:|---------:|
    | a/b   | 8 | 2 of 3 |       0.50 |  1.50 |     0.75 |     0.50 |             |     0.60 |
    """
    rows = map(json.loads, lines)
    cells = [[r["model"], str(r["batch"]), f"{r['fused']} of {r['blocks']}", *numbers_of(r)] for r in rows]
    return markdown_table(("model", "B", "one op", *HEADS), cells)


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The row of each case, one after the other; a case that cannot be measured is named, with the reason."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    cases = [(name, batch) for name in options.models for batch in options.batch]
    for name, batch in tqdm(cases, leave=False, disable=len(cases) == 1):
        try:
            yield Case.of(name, batch).measured(options.rounds, clock)
        except (ImportError, RuntimeError) as why:
            tqdm.write(f"{name}, batch {batch}: not measured: {why}")


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
    run |= engines.versions()
    if options.show:
        print(table(Path(options.show).read_text(encoding="utf-8").splitlines()))
        return
    torch.set_num_threads(options.threads)
    keep_allocations_on_the_heap()
    if absent := engines.missing():
        print(f"not installed, and so not compared with: {', '.join(absent)}")
    print(f"{'model':34}{'B':>4}{'fused':>8}{'ours ms':>10}" + "".join(f"{head:>12}" for head in HEADS))
    for row in rows(options):
        fused, own = f"{row['fused']}/{row['blocks']}", row["milliseconds"]["elastic"]
        cells = "".join(f"{cell:>12}" for cell in numbers_of(row))
        tqdm.write(f"{row['model']:34}{row['batch']:4}{fused:>8}{own:10.2f}{cells}")
        if options.out:
            with open(options.out, "a", encoding="utf-8") as file:
                file.write(json.dumps({**row, **run}) + "\n")


if __name__ == "__main__":
    main()
