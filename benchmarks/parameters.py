"""Cases as pytest's parameters. Apart from the harness, which also runs where there is no pytest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from .harness import Case


def everywhere(cases: Sequence[Case], *, on_gpu: bool = True) -> list[Any]:
    """Cases as pytest's parameters; where there is a GPU, each once more on it."""
    found = list(cases)
    if on_gpu and torch.cuda.is_available():
        found += [replace(case, device="cuda") for case in cases]
    return [pytest.param(case, id=case.id) for case in found]


def extra(cases: Sequence[Case]) -> list[Any]:
    """Cases that only run when ``--all-cases`` asks for them."""
    return [pytest.param(case, id=case.id, marks=pytest.mark.extra) for case in cases]
