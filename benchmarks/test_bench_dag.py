"""A mixed batch of several tasks, each with its own sub-graph, against one task after the other and the whole graph.

A row's ``throughput`` is the time of the tasks one after the other, the same images in their extracted networks, over
ours; ``throughput_whole`` that of the tasks one after the other in networks that compute the whole graph, as masking
does; ``realised`` is (time of the whole graph, dense / ours) / (FLOPs of the whole graph / ours), as everywhere.
"""

import functools
from typing import Any

import pytest
import torch

from .dag_network import PER_TASK, HardShared, MixedTasks
from .harness import Case, Provider, Settings, expect, provide, run

SHAPES = ("16x7", "24x7", "32x8", "48x14")  # channels x side; den dag train dag-omniglot has 24x7
DENSE_SHAPES = ("64x32x64",)  # channels x height x width; those of dag-cityscapes on images as they are handed on
CASES = [
    *(Case("dag", shape, PER_TASK * tasks, f"{tasks}-tasks", "float32") for shape in SHAPES for tasks in (8, 20)),
    *(Case("dag", shape, 6, "3-dense-tasks", "float32") for shape in DENSE_SHAPES),
]


def providers_of(mixed: MixedTasks) -> list[Provider]:
    """Ours; the tasks one after the other, extracted; the whole graph, on the kernels and in ordinary convolutions."""
    expected = expect(functools.partial(mixed.together, mixed.network), torch.float32, factor=4.0)
    whole = expect(functools.partial(mixed.together, mixed.whole), torch.float32, factor=4.0)
    alone, alone_whole = mixed.extracted(mixed.network), mixed.extracted(mixed.whole)
    calls = {
        "ours": lambda: mixed.together(mixed.network),
        "one-by-one": lambda: mixed.one_by_one(alone),
        "one-by-one-whole": lambda: mixed.one_by_one(alone_whole),
        "ours-whole": lambda: mixed.together(mixed.whole),
        "dense-whole": functools.partial(HardShared(mixed.whole), mixed.images),
    }
    return provide(calls, expected, whole)


@pytest.mark.network
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_dag(benchmark: Any, case: Case, settings: Settings) -> None:
    with torch.no_grad():
        mixed = MixedTasks.make(case)
        providers = providers_of(mixed)
    run(benchmark, case, providers, mixed.work(), settings)
    if not benchmark.disabled:
        medians = {name: values["median"] for name, values in benchmark.extra_info["providers"].items()}
        benchmark.extra_info["throughput"] = medians["one-by-one"] / medians["ours"]
        benchmark.extra_info["throughput_whole"] = medians["one-by-one-whole"] / medians["ours"]
