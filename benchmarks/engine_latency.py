"""`den.Engine` on one image at half the FLOPs, against the model as it was.

    python -m benchmarks.engine_latency [MODEL ...] [--flops 0.5] [--rounds 15] [--threads 1]

Each model (of `convert_speed`, with random weights) is converted and run by an engine at the best structure for that
share of its FLOPs, in turns with the model itself in plain PyTorch, its batch norms as they are, in both memory
formats. Prints a table of median milliseconds.
"""

import argparse
import copy

import torch
from tqdm import tqdm

import den
import den_kernels
from benchmarks import packages
from benchmarks.convert_speed import GROUPS, MODELS, medians
from den.support.call_time import keep_allocations_on_the_heap
from den.support.tables import markdown_table

HEAD = ("model", "FLOPs", "contiguous ms", "channels-last ms", "engine ms", "engine / dense")


def row_of(name: str, flops: float, rounds: int) -> list[str]:
    """The cells of a model. Raises ImportError or RuntimeError where its package is not to be had."""
    torch.manual_seed(0)
    plain = packages.build(name).eval()
    x = torch.randn(1, 3, MODELS.get(name, 224), MODELS.get(name, 224))
    elastic = copy.deepcopy(plain)
    den_kernels.convert(elastic, GROUPS, example=x)
    engine = den.Engine(elastic, device="cpu", flops=flops, example=x)
    share = float(engine.network.costs.of(engine.point.structure[None]))
    last, x_last = copy.deepcopy(plain).to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        ways = {"contiguous": lambda: plain(x), "last": lambda: last(x_last), "engine": lambda: engine(x)}
        seconds = medians(ways, rounds)
    dense = min(seconds["contiguous"], seconds["last"])
    return [
        name,
        f"{share:.2f}",
        *(f"{1e3 * each:.2f}" for each in seconds.values()),
        f"{seconds['engine'] / dense:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--flops", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_allocations_on_the_heap()
    rows = []
    for name in tqdm(options.models, leave=False):
        try:
            rows.append(row_of(name, options.flops, options.rounds))
        except (ImportError, RuntimeError) as why:
            tqdm.write(f"{name}: not measured: {why}")
    print(markdown_table(HEAD, rows))


if __name__ == "__main__":
    main()
