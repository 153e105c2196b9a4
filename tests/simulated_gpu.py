"""A GPU that is none: tensors on "cuda" whose values lie in CPU memory, for what runs on a GPU only.

It finds what a CPU forgives: operands on different devices, reading a value back where the host must not wait, and
values that a captured graph would not see anew. Its graphs are lists of operations that a replay runs again into the
same memory. Kernels run as the CPU's. Streams, events and the times they give mean nothing.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from den_kernels import plan

GPU = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="NVIDIA Simulated", major=9, minor=0, multi_processor_count=2, total_memory=1 << 34, L2_cache_size=1 << 10,
    shared_memory_per_block_optin=227 << 10,
)  # fmt: skip


# Operators that do something else on a GPU than on a CPU.
ON_GPU = {
    "den_kernels.plan_levels.default": plan.plan_levels_torch,
    "den_kernels.plan_masks.default": plan.plan_masks_torch,
}


class OnGpu(Tensor):
    """A tensor on the simulated GPU; `values` lies in CPU memory."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "OnGpu":
        made = Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device="meta",  # a torch without CUDA has no guard for its devices
        )  # fmt: skip
        made.values = values
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        raise RuntimeError(f"{function} on a simulated GPU outside of it")

    def __repr__(self) -> str:
        return f"OnGpu({self.values!r})"


class Device(TorchDispatchMode):
    """Runs every operation on CPU memory and keeps account of where tensors are."""

    current: ClassVar["Device | None"] = None

    def __init__(self) -> None:
        super().__init__()
        self.recording: list[tuple] | None = None
        self.waiting = "default"

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = dict(keywords or {})
        tensors = [t for t in tree_flatten((arguments, keywords))[0] if isinstance(t, Tensor)]
        here = [isinstance(t, OnGpu) for t in tensors]
        target = keywords.get("device")
        if target is not None and torch.device(target).type == "meta" and all(here):
            target = GPU  # where torch takes a wrapper to be
        to_gpu = torch.device(target).type == "cuda" if target is not None else any(here)
        name = str(function)
        self._check(name, tensors, to_gpu, target)
        if target is not None and to_gpu:
            keywords["device"] = torch.device("cpu")
        made = run(function, arguments, keywords, to_gpu)
        if self.recording is not None and (to_gpu or any(here)):
            self.recording.append((function, arguments, keywords, made))
        return made

    def _check(self, name: str, tensors: list[Tensor], to_gpu: bool, target: Any) -> None:
        mixed = {isinstance(t, OnGpu) for t in tensors if t.dim()} == {True, False}
        allowed = "copy" in name or ("index" in name and isinstance(tensors[0], OnGpu))  # indices may be on the CPU
        if mixed and not allowed:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, got cuda:0 and cpu")
        reads = ("_local_scalar_dense", "nonzero", "aten.equal", "unique", "masked_select", "bincount")
        back = target is not None and not to_gpu and any(isinstance(t, OnGpu) for t in tensors)
        crosses = "copy_" in name and mixed
        waits = back or crosses or (any(isinstance(t, OnGpu) for t in tensors) and any(read in name for read in reads))
        if waits and self.recording is not None:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        if waits and self.waiting == "error":
            raise RuntimeError(f"{name}: called a synchronizing CUDA operation")


def run(function: Any, arguments: Any, keywords: Any, to_gpu: bool) -> Any:
    """An operation on CPU memory; what it makes is on the GPU if asked. An argument that it returns stays itself."""
    function = ON_GPU.get(str(function), function)
    outer = {id(t.values): t for t in tree_flatten((arguments, keywords))[0] if isinstance(t, OnGpu)}

    def unwrap(t: Any) -> Any:
        return t.values if isinstance(t, OnGpu) else t

    def wrap(t: Any) -> Any:
        if not to_gpu or not isinstance(t, Tensor):
            return t
        return outer[id(t)] if id(t) in outer else OnGpu(t)

    return tree_map(wrap, function(*tree_map(unwrap, arguments), **tree_map(unwrap, keywords)))


class Graph:
    """A list of operations."""

    def __init__(self) -> None:
        self.operations: list[tuple] = []

    def replay(self) -> None:
        """Run them again and put what they make where they put it first."""
        for function, arguments, keywords, made in self.operations:
            again = run(function, arguments, keywords, True)
            for old, new in zip(tree_flatten(made)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, OnGpu) and old.values.data_ptr() != new.values.data_ptr():
                    old.values.copy_(new.values)


@contextlib.contextmanager
def capturing(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
    """`torch.cuda.graph`."""
    assert Device.current is not None
    Device.current.recording = graph.operations
    try:
        yield
    finally:
        Device.current.recording = None


class Event:
    """`torch.cuda.Event`."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.timed = enable_timing

    def record(self) -> None:
        """Nothing is in flight."""

    synchronize = record

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds, made up."""
        assert self.timed
        assert end.timed
        return 0.25


class Generator(torch.Generator):
    """Of random numbers, in CPU memory wherever it is asked for."""

    def __new__(cls, device: Any = None) -> "Generator":
        return super().__new__(cls)


def tensor(data: Any, *, device: Any = None, make: Any = torch.tensor, **keywords: Any) -> Tensor:
    """`torch.tensor`, whose memory does not go through the dispatcher."""
    made = make(data, **keywords)
    return made if device is None else made.to(device)


def set_waiting(mode: str) -> None:
    """`torch.cuda.set_sync_debug_mode`."""
    assert Device.current is not None
    Device.current.waiting = mode


@contextlib.contextmanager
def simulated(monkeypatch: Any) -> Iterator[None]:
    """In here `torch.cuda` is the simulated GPU."""
    stream = SimpleNamespace(wait_stream=lambda other: None, cuda_stream=0)
    changes: dict[str, Any] = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1,
        "synchronize": lambda device=None: None, "current_device": lambda: 0, "set_device": lambda device: None,
        "get_device_name": lambda device=None: PROPERTIES.name, "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: (9, 0), "CUDAGraph": Graph, "graph": capturing, "Event": Event,
        "Stream": lambda device=None: stream, "current_stream": lambda device=None: stream,
        "stream": contextlib.nullcontext, "set_sync_debug_mode": set_waiting,
    }  # fmt: skip
    for name, change in changes.items():
        monkeypatch.setattr(torch.cuda, name, change)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # a wrapper's version cannot be set in it
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    with Device() as Device.current:
        yield
    Device.current = None
