"""A network beside another busy process on the same cores: by how much longer it takes, and the dense ones."""

import json
from typing import Any

import pytest

from .harness import Case, Settings, describe
from .parameters import extra, marked
from .processes import answer_of

CASES = [Case("contention", "wrn32_4", batch, "1.88x", "float32") for batch in (32, 1)]
REST = [Case("contention", "wrn32_4", batch, "1.88x", "bfloat16") for batch in (32, 1)]


@pytest.mark.network
@pytest.mark.contention
@pytest.mark.parametrize("case", [*marked(CASES), *extra(REST)])
def test_contention(benchmark: Any, case: Case, settings: Settings) -> None:
    """Median times of ours, PyTorch and the inference engines, alone and beside the busy process."""
    threads = settings.environment["threads"]
    arguments = ("benchmarks.contention", json.dumps(vars(case)), str(settings.seconds), str(threads))
    found = benchmark.pedantic(answer_of, args=arguments, rounds=1)
    benchmark.group = case.suite
    benchmark.extra_info.update(describe(case, settings), contention=found)
