"""A Deep Elastic Network end to end (stem, selector, plan, blocks, head) against the same network, dense."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from . import memory, peers
from .elastic_network import ElasticNetwork
from .harness import Case, Provider, Settings, dense_role, describe, expect, run

# Folding rounds the weights once more in each of 15 blocks: bn2 folded in bfloat16 was seen at 2.03 times the error.
FACTOR = 3.0
CASES = [Case("network", "wrn32_4", 64, "1.9x", dtype) for dtype in ("float32", "bfloat16")]
MEMORY_CASES = [Case("memory", "wrn32_4", 64, "1.9x", "float32")]


def dense_providers(network: ElasticNetwork, settings: Settings) -> list[Provider]:
    """The full structure in plain nn.Conv2d: eager, bn2 folded, weights packed, compiled."""
    images, dense = network.images, network.dense(network.dtype)
    blocks = list(dense.blocks)
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "dense-eager": dense,
        "dense-folded": dense.with_blocks([peers.FoldedBlock(block) for block in blocks]),
    }
    if peers.can_pack():
        sizes = dense.block_input_sizes(images)
        packed = [peers.PackedBlock(block, size) for block, size in zip(blocks, sizes, strict=True)]
        found["dense-packed"] = dense.with_blocks(packed)
    if settings.compile != "none":
        function = peers.compiled(copy.deepcopy(dense), images)
        if function is not None:
            found["dense-compiled"] = function
    expected = expect(lambda dtype: network.dense(dtype)(images.to(dtype)), network.dtype, FACTOR)
    return [Provider(name, dense_role(name), functools.partial(call, images), expected) for name, call in found.items()]


def elastic_providers(network: ElasticNetwork) -> list[Provider]:
    """Ours (selector and plan inside the timing), masking, and bucketing in plain PyTorch (both given the levels)."""
    images = network.images
    expected = expect(lambda dtype: network.bucketed(dtype)(images.to(dtype)), network.dtype, FACTOR)
    return [
        Provider("ours", "ours", network.forward, expected),
        Provider("masked", "alternative", functools.partial(network.masked(), images), expected),
        Provider("bucket", "alternative", functools.partial(network.bucketed(network.dtype), images), expected),
    ]


@pytest.mark.network
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_network(benchmark: Any, case: Case, settings: Settings) -> None:
    with torch.no_grad():
        network = ElasticNetwork.make(case)
        providers = [*elastic_providers(network), *dense_providers(network, settings)]
    run(benchmark, case, providers, network.work(), settings)


def peak_in_a_process(provider: str, case: Case) -> dict[str, int]:
    """``python -m benchmarks.memory`` for one provider: its answer, in bytes."""
    command = [sys.executable, "-P", "-m", "benchmarks.memory", provider, json.dumps(vars(case))]
    root = Path(__file__).resolve().parent.parent
    packages = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(root)])}  # the same ones as here
    answer = subprocess.run(command, env=packages, check=True, capture_output=True, text=True).stdout
    return json.loads(answer.splitlines()[-1])


@pytest.mark.network
@pytest.mark.memory
@pytest.mark.parametrize("case", MEMORY_CASES, ids=lambda case: case.id)
def test_memory(benchmark: Any, case: Case, settings: Settings) -> None:
    """Peak resident memory of weights, caches and three forward passes, each network in a process of its own."""
    if not memory.is_measurable():
        pytest.skip("peak memory is read from /proc/self/status")
    peaks = {"ours": benchmark.pedantic(peak_in_a_process, args=("ours", case), rounds=1)}
    for provider in ("dense-eager", "dense-folded"):
        peaks[provider] = peak_in_a_process(provider, case)
    least = min(peaks[name]["peak"] for name in peaks if name != "ours")
    benchmark.group = case.suite
    benchmark.extra_info.update(describe(case, settings), peaks=peaks, peak_share=peaks["ours"]["peak"] / least)
