"""A kernel launch as a value: what would run, to be run or to be looked at."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """`kernel[(programs,)](**arguments)`."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]

    def extended(self, arguments: dict[str, Any]) -> "Launch":
        """This launch with more arguments."""
        return self._replace(arguments=self.arguments | arguments)

    def run(self, like: Tensor) -> dict[str, Any]:
        """Launch on the device of `like` [...], which need not be the current one; returns the arguments."""
        with torch.cuda.device_of(like):
            self.kernel[(self.programs,)](**self.arguments)
        return self.arguments


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> tuple[int, int]:
    """Compute capability (90 for 9.0) and multiprocessors of a device; those of a small one for the interpreter."""
    if device.type != "cuda":
        return 80, 2
    found = torch.cuda.get_device_properties(device)
    return found.major * 10 + found.minor, found.multi_processor_count
