"""The launches of a call on the simulated GPU, where our ops go the way that they go on a GPU."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from den_kernels import _cuda, eager
from den_kernels._triton.launch import Launch
from den_kernels.plan_sort import plan_levels_torch
from tests.simulated_gpu import Device, OnGpu, simulated

Run = Callable[[Launch, Tensor], dict[str, Any]]


class Launches(list[str]):
    """Names of what was launched: our kernels by their own, PyTorch's by the operation."""

    def of(self, call: Callable[[], Any]) -> "Launches":
        """The launches of one call."""
        self.clear()
        call()
        return Launches(self)


@contextlib.contextmanager
def counted(monkeypatch: Any, run: Run | None = None, fused: Callable[..., Any] | None = None) -> Iterator[Launches]:
    """The simulated GPU; Triton launches are counted, and run by `run`, or left out.

    fused: `_cuda.layout_of`; None: no block has a layout, and all run as launches in Triton.
    """
    launched = Launches()

    def launch(self: Launch, like: Tensor) -> dict[str, Any]:
        launched.append(self.kernel.fn.__name__)
        return self.arguments if run is None else run(self, like)

    def alone(name: str, function: Callable[..., None]) -> Callable[..., None]:
        """A kernel of the extension, by PyTorch's operations, as one launch."""

        def call(*arguments: Any, **keywords: Any) -> None:
            Device.current.launched = None
            function(*arguments, **keywords)
            Device.current.launched = launched
            launched.append(name)

        return call

    def plan(levels: Tensor, groups: int, *outputs: Tensor) -> None:
        for output, values in zip(outputs, plan_levels_torch(levels, groups), strict=True):
            output.copy_(values)

    with monkeypatch.context() as patches, simulated(patches):
        patches.setattr(Launch, "run", launch)
        patches.setattr(eager, "_PLAIN", (*eager._PLAIN, OnGpu))
        patches.setattr(_cuda, "plans_levels", lambda device, groups: device.type == "cuda")
        patches.setattr(_cuda, "plan_levels", alone("plan_levels", plan))
        patches.setattr(_cuda, "layout_of", fused or (lambda *_: None))
        patches.setattr(_cuda, "fused_residual", alone("fused_residual", lambda *_, **__: None))
        Device.current.launched = launched
        yield launched


def on_gpu(*tensors: Tensor) -> list[Tensor]:
    """Copies on the simulated GPU."""
    return [tensor.to(torch.device("cuda", 0)) for tensor in tensors]
