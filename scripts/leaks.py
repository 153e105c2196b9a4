#!/usr/bin/env python3
"""Trains and serves for long, at random levels and batch sizes: memory stays flat and a probe batch keeps its bits.

    scripts/leaks.py [--steps 2000] [--calls 20000] [--write]

Beside that: eight threads call one engine, processes of both kinds (fork and spawn) load data beside a model in use,
and every cache of functions has a bound.  --write puts the table into docs/results/trust.md.
"""

import argparse
import functools
import gc
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import den
from den.support.tables import markdown_table, write_section
from den_kernels import DynamicBatchNorm2d, DynamicConv2d, RoutingPlan

PAGE = Path(__file__).resolve().parents[1] / "docs/results/trust.md"
TASKS = (den.Task("a", classes=10, size=16), den.Task("b", classes=5, size=16))
MOST = 16  # images of a batch
ALLOWED = 0.02  # growth of memory


def memory() -> int:
    """Bytes of this process that lie in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096


def network() -> den.DeepElasticNetwork:
    torch.manual_seed(0)
    model = den.create_model("wrn14_1", list(TASKS), levels=4, trunk_size=16)
    for head in model.selector.heads:
        nn.init.normal_(head.weight)
    return model


@dataclass
class Found:
    """Finding of a check, in words or as the cells of a row, and whether it is what it must be."""

    text: str | list[str]
    good: bool


def repeated(name: str, count: int, turn: Callable[[], object], probe: Callable[[], Tensor | None]) -> Found:
    """A row: `turn` so often; memory after a tenth of it and at the end, and whether the probe kept its bits."""
    first, early, begun = probe(), 0, time.perf_counter()
    for i in range(count):
        if i == count // 10:
            early = memory()
        turn()
    seconds, late, last = time.perf_counter() - begun, memory(), probe()
    growth = late / early - 1
    same = first is None or last is None or torch.equal(first, last)
    good = same and abs(growth) <= ALLOWED
    bits = "-" if first is None else "the same" if same else "**changed**"
    print(f"{name}: {seconds:.0f} s, {growth:+.2%}", flush=True)
    numbers = f"{count:,}", f"{early / 1e6:.1f}", f"{late / 1e6:.1f}", f"{growth:+.2%}"
    return Found([name, *numbers, bits, "yes" if good else "**NO**"], good)


def training(count: int) -> Found:
    """Steps of an estimator at random levels."""
    torch.manual_seed(1)
    model, draws = network().estimator.train(), random.Random(1)
    blocks = len(model.blocks)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def turn() -> None:
        task = draws.randrange(2)
        images = torch.randn(draws.randint(2, MOST), 3, 16, 16)
        logits = model(images, TASKS[task].name, torch.randint(4, (len(images), blocks)))
        optimiser.zero_grad()
        logits.square().mean().backward()
        optimiser.step()

    return repeated("training steps", count, turn, lambda: None)


def engine_calls(count: int) -> Found:
    """Calls of an engine with batches and levels of every kind."""
    engine, draws, generator = den.Engine(network().eval(), max_batch=8), random.Random(2), torch.Generator()
    generator.manual_seed(2)
    shown = torch.randn(MOST, 3, 16, 16, generator=generator)

    def turn() -> None:
        images = torch.randn(draws.randint(1, MOST), 3, 16, 16, generator=generator)
        levels = torch.randint(4, (len(images), len(engine.blocks)), generator=generator)
        engine(images, TASKS[draws.randrange(2)].name, levels=levels if draws.random() < 0.5 else None)

    return repeated("engine calls", count, turn, lambda: engine(shown, "a"))


def layer_calls(count: int) -> Found:
    """Calls of single layers with levels and masks, in other memory formats, whose segments are all different."""
    draws, generator = random.Random(3), torch.Generator().manual_seed(3)
    conv, norm = DynamicConv2d(24, 24, 3, padding=1, out_groups=(4, 8, 12)), DynamicBatchNorm2d(24, groups=(4, 8, 12))
    conv, norm = conv.eval(), norm.eval()
    shown = torch.randn(5, 24, 9, 7, generator=generator)

    @torch.no_grad()
    def turn() -> None:
        x = torch.randn(draws.randint(1, MOST), 24, draws.randint(3, 12), draws.randint(3, 12), generator=generator)
        if draws.random() < 0.5:
            x = x.contiguous(memory_format=torch.channels_last)
        mask = torch.rand(len(x), 3, generator=generator) < 0.5
        route = RoutingPlan.from_masks(mask[:, None])[0] if draws.random() < 0.5 else mask.sum(1)
        norm(conv(x, route), route, relu=True)

    @torch.no_grad()
    def probe() -> Tensor:
        return norm(conv(shown, torch.tensor([0, 1, 2, 3, 1])), torch.tensor([0, 1, 2, 3, 1]))

    return repeated("layer calls", count, turn, probe)


def threads_at_once(calls: int, workers: int = 8) -> Found:
    """Check that threads that call one engine at once get the bits that one alone gets."""
    engine = den.Engine(network().eval(), max_batch=8)
    batches = [torch.randn(n + 1, 3, 16, 16, generator=torch.Generator().manual_seed(n)) for n in range(workers)]
    wanted, wrong = [engine(images, "b") for images in batches], []

    def work(n: int) -> None:
        torch.set_num_threads(1)
        for _ in range(calls):
            if not torch.equal(engine(batches[n], "b"), wanted[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = f"{workers} threads on one engine, {calls:,} calls each: {len(wrong)} results differ from one thread's."
    return Found(text, not wrong)


class Levels(Dataset[Tensor]):
    """Results of a convolution that the workers of a DataLoader compute."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        self.conv = DynamicConv2d(16, 16, 3, padding=1, out_groups=4).eval().requires_grad_(False)

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> Tensor:
        x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(i))
        return self.conv(x.contiguous(memory_format=torch.channels_last), torch.tensor([i % 5, 2]))


def workers(kind: str) -> Found:
    """Check that workers of a DataLoader get the bits of this process, which goes on to use its threads."""
    engine, shown, data = den.Engine(network().eval()), torch.randn(8, 3, 16, 16), Levels()
    wanted, before = [data[i] for i in range(len(data))], engine(shown, "a")
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=kind)
    wrong = sum(not torch.equal(got, want) for got, want in zip(loader, wanted, strict=True))
    wrong += not torch.equal(engine(shown, "a"), before)
    text = f"Two DataLoader workers by {kind}, {len(data)} items, an engine in use beside them: {wrong} results differ."
    return Found(text, not wrong)


def cached_functions() -> Iterator[tuple[str, functools._lru_cache_wrapper]]:  # type: ignore[type-arg]
    """The functions of ours that keep results, by name."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").split(".")[0] in ("den", "den_kernels"):
            for name, value in vars(module).items():
                if isinstance(value, functools._lru_cache_wrapper) and value.__module__.startswith("den"):
                    yield f"{value.__module__}.{name}", value


def caches() -> Found:
    """Check that every cache of a function has a bound, and say how full the fullest is."""
    found = dict(cached_functions())
    endless = [name for name, function in found.items() if function.cache_info().maxsize is None]
    sizes = {name: function.cache_info() for name, function in found.items()}
    fullest = max(sizes, key=lambda name: sizes[name].currsize)
    info = sizes[fullest]
    text = (
        f"{len(found)} functions keep results, {len(endless)} of them without a bound; the fullest is {fullest} "
        f"({info.currsize:,} of {info.maxsize:,})."
    )
    return Found(text, not endless)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--write", action="store_true", help="put the table into docs/results/trust.md")
    options = parser.parse_args()
    rows = [training(options.steps), engine_calls(options.calls), layer_calls(options.calls)]
    head = ("what", "times", "MB after a tenth", "MB at the end", "growth", "probe's bits", "flat within 2 %")
    lines = [threads_at_once(options.calls // 100), workers("fork"), workers("spawn"), caches()]
    table = markdown_table(head, [row.text for row in rows])
    text = "\n".join([table, "", *(f"- {line.text}" for line in lines)])
    print(text)
    if options.write:
        write_section(PAGE, "leaks", text)
    return int(not all(found.good for found in (*rows, *lines)))


if __name__ == "__main__":
    sys.exit(main())
