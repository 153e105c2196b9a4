"""Parameters of tests of which a few run always and the others before a release."""

from collections.abc import Iterable
from typing import Any

import pytest


def always(values: Iterable[Any], *kept: Any) -> list:
    """The values as parameters, those that are not among the kept ones marked `release`.

    Raises ValueError for a kept one that is not there.
    """
    values = list(values)
    if missing := [value for value in kept if value not in values]:
        raise ValueError(f"always: kept must be among {values}, got {missing}")
    return [value if value in kept else pytest.param(value, marks=pytest.mark.release) for value in values]
