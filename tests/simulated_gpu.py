"""A GPU that is none: tensors on "cuda" whose values lie in CPU memory, for what runs on a GPU only.

It finds what a CPU forgives: operands on different devices, reading a value back where the host must not wait, and
values that a captured graph would not see anew; and streams that read what another has not written yet. Its graphs are
lists of operations that a replay runs again into the same memory. Kernels run as the CPU's. Times mean nothing.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_flatten, tree_map

from den_kernels import eager, plan_sort
from tests.simulated_streams import Event, Stream, Writes, on, synchronize

GPU = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="NVIDIA Simulated", major=9, minor=0, multi_processor_count=2, total_memory=1 << 34, L2_cache_size=1 << 10,
    shared_memory_per_block_optin=227 << 10,
)  # fmt: skip


# Operators that do something else on a GPU than on a CPU.
ON_GPU = {
    "den_kernels.plan_levels.default": plan_sort.plan_levels_torch,
    "den_kernels.plan_masks.default": plan_sort.plan_masks_torch,
}


class OnGpu(Tensor):
    """A tensor on the simulated GPU; `values` lies in CPU memory."""

    values: Tensor
    readers: list[Stream]  # as `record_stream` was told

    @staticmethod
    def __new__(cls, values: Tensor) -> "OnGpu":
        made = Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device="meta",  # a torch without CUDA has no guard for its devices
        )  # fmt: skip
        made.values, made.readers = values, []
        return made

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        """Another stream reads it."""
        self.readers.append(stream)

    def tolist(self) -> Any:
        """The values, which the host waits for."""
        return self.cpu().tolist()

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def data_ptr(self) -> int:
        """Where its values lie."""
        return self.values.data_ptr()

    def __deepcopy__(self, memo: dict) -> Tensor:
        """A leaf of its own: torch would copy the storage, which is not where the values lie."""
        made = self.detach().clone().requires_grad_(self.requires_grad)
        made._is_param = getattr(self, "_is_param", False)
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        raise RuntimeError(f"{function} on a simulated GPU outside of it")

    def __repr__(self) -> str:
        return f"OnGpu({self.values!r})"


class Device(TorchDispatchMode):
    """Runs every operation on CPU memory and keeps account of where tensors are."""

    current: ClassVar["Device | None"] = None
    operators: ClassVar[dict[str, Any]] = {}  # of ours that run as on a GPU, not as the CPU's: their functions

    def __init__(self) -> None:
        super().__init__()
        self.recording: list[tuple] | None = None
        self.waiting = "default"
        self.launched: list[str] | None = None  # names of operations that write memory, where somebody counts them
        self.writes = Writes()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = dict(keywords or {})
        if str(function) in self.operators:
            with self:
                return self.operators[str(function)](*arguments, **keywords)
        tensors = [t for t in tree_flatten((arguments, keywords))[0] if isinstance(t, Tensor)]
        here = [isinstance(t, OnGpu) for t in tensors]
        target = keywords.get("device")
        if target is not None and torch.device(target).type == "meta" and all(here):
            target = GPU  # where torch takes a wrapper to be
        to_gpu = torch.device(target).type == "cuda" if target is not None else any(here)
        name = str(function)
        self._check(name, tensors, to_gpu, target, bool(keywords.get("non_blocking")))
        if target is not None and to_gpu:
            keywords["device"] = torch.device("cpu")
        self.writes.check(name, values_of(tensors))
        made = run(function, arguments, keywords, to_gpu)
        if is_not_a_view(made, tensors):
            self.writes.note(values_of(tree_flatten(made)[0]))
            if self.launched is not None and (to_gpu or any(here)):
                self.launched += kernels_of(name, arguments)
        if self.recording is not None and (to_gpu or any(here)):
            self.recording.append((function, arguments, keywords, made))
        return made

    def _check(self, name: str, tensors: list[Tensor], to_gpu: bool, target: Any, unhindered: bool) -> None:
        mixed = {isinstance(t, OnGpu) for t in tensors if t.dim()} == {True, False}
        allowed = "copy" in name or ("index" in name and isinstance(tensors[0], OnGpu))  # indices may be on the CPU
        if mixed and not allowed:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, got cuda:0 and cpu")
        reads = ("_local_scalar_dense", "nonzero", "aten.equal", "unique", "masked_select", "bincount")
        back = target is not None and not to_gpu and any(isinstance(t, OnGpu) for t in tensors)
        crosses = "copy_" in name and mixed
        sent = "_to_copy" in name and to_gpu and not any(isinstance(t, OnGpu) for t in tensors)
        if sent and self.recording is not None:
            raise RuntimeError(f"{name}: a captured graph would copy from memory that is the host's again")
        crosses = crosses or (sent and not unhindered)
        waits = back or crosses or (any(isinstance(t, OnGpu) for t in tensors) and any(read in name for read in reads))
        if waits and self.recording is not None:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        if waits and self.waiting == "error":
            raise RuntimeError(f"{name}: called a synchronizing CUDA operation")


def kernels_of(name: str, arguments: Any) -> list[str]:
    """What a GPU would launch for an operation: nothing for memory that is not filled, two for a convolution's bias."""
    if name.startswith(("aten.empty", "aten.new_empty", "aten.detach")):
        return []
    with_bias = name.startswith("aten.convolution") and arguments[2] is not None
    return [name, "bias"] if with_bias else [name]


def values_of(parts: list) -> list[Tensor]:
    """The memory of those that are on the GPU."""
    return [part.values for part in parts if isinstance(part, OnGpu)]


def is_not_a_view(made: Any, tensors: list[Tensor]) -> bool:
    """Whether an operation wrote something: a new tensor, or one that it was given and returns."""
    given = {id(t) for t in tensors}
    memory = {t.untyped_storage().data_ptr() for t in values_of(tensors)}
    results = [t for t in tree_flatten(made)[0] if isinstance(t, OnGpu)]
    return any(id(t) in given or t.values.untyped_storage().data_ptr() not in memory for t in results)


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
        assert Device.current is not None
        for function, arguments, keywords, made in self.operations:
            again = run(function, arguments, keywords, True)
            for old, new in zip(tree_flatten(made)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, OnGpu) and old.values.data_ptr() != new.values.data_ptr():
                    old.values.copy_(new.values)
            Device.current.writes.note(values_of(tree_flatten(made)[0]))


@contextlib.contextmanager
def capturing(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
    """`torch.cuda.graph`."""
    assert Device.current is not None
    synchronize()
    Device.current.recording = graph.operations
    try:
        with on(Stream()):
            yield
            synchronize()
    finally:
        Device.current.recording = None


class Generator(torch.Generator):
    """Of random numbers, in CPU memory wherever it is asked for."""

    def __new__(cls, device: Any = None) -> "Generator":
        return super().__new__(cls)


def tensor(data: Any, *, device: Any = None, make: Any = torch.tensor, **keywords: Any) -> Tensor:
    """`torch.tensor`, whose memory does not go through the dispatcher."""
    made = make(data, **keywords)
    return made if device is None else made.to(device)


def to(tensor: Tensor, *arguments: Any, move: Any = Tensor.to, **keywords: Any) -> Tensor:
    """`Tensor.to`; "cuda" is the one GPU there is, which torch itself looks for only where it has CUDA."""
    there = (GPU if isinstance(each, str | torch.device) and str(each) == "cuda" else each for each in arguments)
    return move(tensor, *there, **keywords)


def tracers() -> int:
    """Dispatch modes but for the device itself, which traces nothing."""
    return sum(not isinstance(mode, Device) for mode in _get_current_dispatch_mode_stack())


def set_waiting(mode: str) -> None:
    """`torch.cuda.set_sync_debug_mode`."""
    assert Device.current is not None
    Device.current.waiting = mode


@contextlib.contextmanager
def simulated(monkeypatch: Any) -> Iterator[None]:
    """In here `torch.cuda` is the simulated GPU."""
    Stream.current = Stream()
    changes: dict[str, Any] = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1,
        "synchronize": synchronize, "current_device": lambda: 0, "set_device": lambda device: None,
        "get_device_name": lambda device=None: PROPERTIES.name, "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: (9, 0), "CUDAGraph": Graph, "graph": capturing, "Event": Event,
        "Stream": Stream, "current_stream": lambda device=None: Stream.current, "stream": on,
        "is_current_stream_capturing": lambda: bool(Device.current and Device.current.recording is not None),
        "set_sync_debug_mode": set_waiting, "_sleep": lambda cycles: None,
        "mem_get_info": lambda device=None: (1 << 33, 1 << 34),
        "get_rng_state_all": lambda: [], "manual_seed_all": lambda seed: None,
    }  # fmt: skip
    for name, change in changes.items():
        monkeypatch.setattr(torch.cuda, name, change)
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "tensor", tensor)
    # A wrapper's version cannot be set in inference mode; `mode` may be a function, where it decorates one.
    plain = torch.no_grad
    monkeypatch.setattr(torch, "inference_mode", lambda mode=True: plain(mode) if callable(mode) else plain())
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    monkeypatch.setattr(eager, "_modes", tracers)
    with Device() as Device.current:
        yield
    Device.current = None
