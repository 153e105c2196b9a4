"""Time against the batch, from one image to 1,024: where dense, bucket and ours cross."""

from typing import Any

import pytest

from .harness import Case, Settings
from .parameters import everywhere, extra
from .test_bench_network import run_network
from .test_bench_residual import run_block

BATCHES = (1, 4, 16, 64, 256, 1024)
BLOCK = [Case("latency-block", "64x16x16", batch, "uniform", "float32") for batch in BATCHES]
NETWORK = [
    *[Case("latency-network", "demo", batch, "recorded-fashion", "float32") for batch in BATCHES],
    Case("latency-network", "wrn32_4", 1, "1.88x", "float32"),
]
BLOCK_REST = [Case("latency-block", "128x16x16", batch, "uniform", "float32") for batch in BATCHES]
NETWORK_REST = [Case("latency-network", "wrn32_4", batch, "1.88x", "float32") for batch in BATCHES[1:5]]


@pytest.mark.op
@pytest.mark.latency
@pytest.mark.parametrize("case", [*everywhere(BLOCK), *extra(BLOCK_REST)])
def test_block_latency(benchmark: Any, case: Case, settings: Settings) -> None:
    run_block(benchmark, case, settings)


@pytest.mark.network
@pytest.mark.latency
@pytest.mark.parametrize("case", [*everywhere(NETWORK), *extra(NETWORK_REST)])
def test_network_latency(benchmark: Any, case: Case, settings: Settings) -> None:
    run_network(benchmark, case, settings)
