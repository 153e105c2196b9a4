"""Cases as pytest's parameters. conftest.py leaves out those that this run does not want."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from .harness import Case


def everywhere(cases: Sequence[Case]) -> list[Any]:
    """Cases on the CPU and, where there is a GPU, each once more on it."""
    here = [pytest.param(case, id=case.id) for case in cases]
    return here + marked([replace(case, device="cuda") for case in cases], pytest.mark.gpu)


def extra(cases: Sequence[Case]) -> list[Any]:
    """Cases that only run when ``--all-cases`` asks for them."""
    return marked(cases, pytest.mark.extra)


def checked(cases: Sequence[Case], tiny: Sequence[Case]) -> list[Any]:
    """Cases that `benchmarks.gpu_check` times, on a GPU; in a rehearsal the tiny ones in their place."""
    large, small = ([replace(case, device="cuda") for case in kind] for kind in (cases, tiny))
    marks = pytest.mark.gpu, pytest.mark.check
    return marked(large, *marks) + marked(small, *marks, pytest.mark.rehearsal)


def marked(cases: Sequence[Case], *marks: pytest.MarkDecorator) -> list[Any]:
    """Parameters with marks."""
    return [pytest.param(case, id=case.id, marks=marks) for case in cases]
