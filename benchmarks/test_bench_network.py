"""A Deep Elastic Network end to end (stem, selector, plan, blocks, head) against the same network, dense."""

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from . import engines, memory, peers, slicing
from .allocations import require
from .elastic_network import ElasticNetwork
from .harness import Case, Expected, Provider, Settings, describe, expect, provide, run
from .parameters import checked, everywhere, extra, marked
from .processes import answer_of
from .shapes import GPU_MIXES

# Folding rounds the weights once more in each of 15 blocks: bn2 folded in bfloat16 was seen at 2.03 times the error.
FACTOR = 3.0
COMPILED = 32  # batches from here on are also run compiled: smaller ones take longer to compile than to measure
SLICED = 8  # images at most for the provider that works image by image
PAPER = [
    *[Case("network", "wrn32_4", 64, "1.88x", dtype) for dtype in ("float32", "bfloat16")],
    *[Case("network", "resnet42", 16, mix, "float32") for mix in ("1.81x", "2.15x")],
]
MIXES = ("full", "zero", "quarter", "skewed", "one-odd", "random-blocks")
RECORDED = ("recorded-digits", "recorded-fashion")
CASES = [
    *PAPER,
    *[Case("network", "wrn32_4", 8, mix, "float32") for mix in MIXES],
    *[Case("network", "demo", 256, mix, "float32") for mix in RECORDED],
]
REST = [
    *[Case("network", "wrn32_4", 64, mix, dtype) for mix in MIXES for dtype in ("float32", "bfloat16")],
    *[Case("network", "resnet42", 64, mix, "bfloat16") for mix in ("1.81x", "2.15x")],
    *[Case("network", "demo", 256, mix, "bfloat16") for mix in RECORDED],
]
GPU = [Case("network", "wrn32_4", 256, mix, "bfloat16") for mix in GPU_MIXES]
TINY = [Case("network", "wrn8_1", 2, "uniform", "bfloat16")]
MEMORY_CASES = [
    Case("memory", "wrn32_4", 64, "1.88x", "float32"),
    Case("memory", "resnet42", 16, "1.81x", "float32"),
]


@functools.lru_cache(maxsize=1)
def dense_side(
    shape: str, batch: int, dtype: str, device: str, task: str, compiles: bool, autotune: bool, names: tuple[str, ...]
) -> list[Provider]:
    """The full structure in plain nn.Conv2d, shared by the mixes of a shape: eager, folded, packed, compiled.

    names: the inference engines that run it too, from the folded one.
    """
    mix = f"recorded-{task}" if shape == "demo" else "full"  # names the task; the structures are not used
    network = ElasticNetwork.make(Case("network", shape, batch, mix, dtype, device))
    dense, images = network.dense(network.dtype), network.images
    blocks = list(dense.blocks)
    folded = dense.with_blocks([peers.FoldedBlock(block) for block in blocks]).eval()
    found: dict[str, Callable[[Tensor], Tensor]] = {"dense-eager": dense, "dense-folded": folded}
    if peers.can_pack(images):
        sizes = dense.block_input_sizes(images)
        packed = [peers.PackedBlock(block, size) for block, size in zip(blocks, sizes, strict=True)]
        found["dense-packed"] = dense.with_blocks(packed)
    if compiles:
        function = peers.compiled(copy.deepcopy(dense), images, autotune)
        if function is not None:
            found["dense-compiled"] = function
    expected = expected_logits(lambda dtype: network.dense(dtype)(images.to(dtype)), network.dtype)
    return [*provide(found, expected, inputs=[images]), *engines.providers(folded, images, expected, names)]


def dense_providers(case: Case, network: ElasticNetwork, settings: Settings) -> list[Provider]:
    """The providers of `dense_side`, as the settings ask; compiled where suite and batch allow it as well."""
    large = case.suite == "network" and case.batch >= COMPILED
    compiles = settings.compile == "all" or (settings.compile == "network" and large)
    task, autotune = network.task.name, settings.autotune
    return dense_side(case.shape, case.batch, case.dtype, case.device, task, compiles, autotune, settings.engines)


def elastic_expectation(network: ElasticNetwork) -> Expected:
    """The oracle with the chosen structures."""
    return expected_logits(lambda dtype: network.bucketed(dtype)(network.images.to(dtype)), network.dtype)


def expected_logits(function: Callable[[torch.dtype], Tensor], dtype: torch.dtype) -> Expected:
    """`harness.expect` of logits. The few of one image may err by little by chance: in float32, whose roundings are of
    that size, as many as FACTOR of the largest logit are always allowed.
    """
    return expect(function, dtype, FACTOR, FACTOR * torch.finfo(dtype).eps if dtype == torch.float32 else 0.0)


def elastic_providers(network: ElasticNetwork) -> list[Provider]:
    """Ours, selector and plan inside the timing; in plain PyTorch, after the same selector, masked, bucketed, sliced.

    The drawn structures replace the selector's choice in all of them. Ours is frozen: for inference alone, as the
    dense network with its batch norms folded is.
    """
    images, expected = network.images, elastic_expectation(network)
    frozen = replace(network, model=copy.deepcopy(network.model).freeze())
    plain = {"masked": network.masked(), "bucket": network.bucketed(network.dtype)}
    if len(images) <= SLICED:
        plain["per-instance"] = network.with_each(slicing.PerInstanceBlock)
    others = {name: functools.partial(choose_and_call, network, call) for name, call in plain.items()}
    return provide({"ours": frozen.forward, **others}, expected)


def choose_and_call(network: ElasticNetwork, call: Callable[[Tensor], Tensor]) -> Tensor:
    """Run the selector, then `call`, built to follow its choice: images [B, c, S, S] -> logits [B, classes]."""
    network.select()
    return call(network.images)


@pytest.mark.network
@pytest.mark.parametrize("case", [*everywhere(CASES), *extra(REST), *checked(GPU, TINY)])
def test_network(benchmark: Any, case: Case, settings: Settings) -> None:
    run_network(benchmark, case, settings)


def run_network(benchmark: Any, case: Case, settings: Settings) -> None:
    """Check and time a case."""
    require(case.id, case.batch * 64 * 32 * 32)
    with torch.no_grad():
        network = ElasticNetwork.make(case)
        providers = [*elastic_providers(network), *dense_providers(case, network, settings)]
    run(benchmark, case, providers, network.work(), settings)


def peak_in_a_process(provider: str, case: Case) -> dict[str, int]:
    """``python -m benchmarks.memory`` for one provider: its answer, in bytes."""
    return answer_of("benchmarks.memory", provider, json.dumps(vars(case)))


@pytest.mark.network
@pytest.mark.memory
@pytest.mark.parametrize("case", marked(MEMORY_CASES))
def test_memory(benchmark: Any, case: Case, settings: Settings) -> None:
    """Peak resident memory of weights, caches and three forward passes, each network in a process of its own.

    A network that could still train is compared with the eager dense one, which could too; a frozen one, without its
    parameters, with the smallest dense one.
    """
    if not memory.is_measurable():
        pytest.skip("peak memory is read from /proc/self/status")
    peaks = {"ours": benchmark.pedantic(peak_in_a_process, args=("ours", case), rounds=1)}
    for provider in ("ours-frozen", "dense-eager", "dense-folded"):
        peaks[provider] = peak_in_a_process(provider, case)
    eager, least = peaks["dense-eager"]["peak"], min(peaks[name]["peak"] for name in ("dense-eager", "dense-folded"))
    benchmark.group = case.suite
    benchmark.extra_info.update(
        describe(case, settings),
        peaks=peaks,
        peak_share=peaks["ours"]["peak"] / eager,
        frozen_share=peaks["ours-frozen"]["peak"] / least,
    )
