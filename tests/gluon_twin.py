"""Gluon on a CPU: the functions of a kernel's file run as Python, with twins of what they call.

Triton's interpreter knows no Gluon. `run` executes the sources of the convolution on strips in a namespace whose `gl`,
`tl`, `tma` and `mbarrier` are those below, on tensors of torch. Shared memory is bytes that begin as NaN, of the size
that the kernel allocates; barriers count arrivals and bytes as the chip's do. The two parts of a program are threads
that take turns. What the chip leaves open a *schedule* decides: who runs when both could, and when things happen.

    eager   the loading part runs ahead as far as it can; copies land when they are issued, products when they are
    lazy    it runs only when the other one waits; copies land at the wait for them, products at the wait for these,
            and a stage is overwritten with NaN the moment that it is given back

A stage that is read too early, given back too early, or one byte short differs between these or never ends, which is
reported as a deadlock. What 128 threads do at different times, registers and swizzling are not modelled; the machine
code is looked at for these (tests/kernels/test_machine_code.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import den_kernels._triton as kernels

SCHEDULES = ("eager", "lazy")
FILES = ("store_kernel.py", "conv_kernel.py", "strip_loads.py", "strip_kernel.py")


class Pointer:
    """Elements of a tensor's memory."""

    def __init__(self, memory: Tensor, at: Any = 0) -> None:  # memory flat, at int or int64 [...]
        self.memory, self.at = memory, at
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.at + more)


def pointer(tensor: Tensor) -> Pointer:
    """To a tensor's first element, over all memory behind it."""
    flat = tensor.untyped_storage()
    whole = torch.empty(0, dtype=tensor.dtype).set_(flat, 0, (flat.nbytes() // tensor.itemsize,))
    return Pointer(whole[tensor.storage_offset() :])


def load(at: Pointer, mask: Any = None, other: float = 0) -> Tensor:
    """The elements, `other` where the mask is false; reading outside of the memory raises IndexError."""
    index = torch.as_tensor(at.at)
    if mask is None:
        return at.memory[index]
    index, mask = torch.broadcast_tensors(index, torch.as_tensor(mask))
    return torch.where(mask, at.memory[torch.where(mask, index, 0)], torch.tensor(other, dtype=at.memory.dtype))


def store(at: Pointer, value: Tensor, mask: Tensor) -> None:
    index, value, mask = torch.broadcast_tensors(torch.as_tensor(at.at), value, mask)
    at.memory[index[mask]] = value[mask]


def where(condition: Any, a: Any, b: Any) -> Tensor:
    return torch.where(torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b))


@dataclass
class Descriptor:
    """A map or weights in global memory, read in boxes; zeros outside."""

    base: Pointer
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: Any

    @property
    def dtype(self) -> torch.dtype:
        return self.base.memory.dtype

    def box(self, corner: list[int]) -> Tensor:
        """The box at a corner, [*block_shape]."""
        index, inside = torch.tensor(0), torch.tensor(True)
        for d, (first, size) in enumerate(zip(map(int, corner), self.block_shape, strict=True)):
            at = (torch.arange(size) + first).view([-1 if i == d else 1 for i in range(len(corner))])
            index, inside = index + at * self.strides[d], inside & (at >= 0) & (at < self.shape[d])
        return load(self.base + index, inside)


@dataclass
class Shared:
    """A piece of shared memory as elements of a shape, the last one next to each other."""

    memory: Tensor  # uint8
    first: int  # byte
    dtype: torch.dtype
    shape: list[int]
    turned: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def index(self, i: int) -> Shared:
        i = int(i)
        assert 0 <= i < self.shape[0], f"piece {i} of {self.shape[0]}"
        size = prod(self.shape[1:]) * self.dtype.itemsize
        return Shared(self.memory, self.first + i * size, self.dtype, self.shape[1:])

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        assert prod(shape) * dtype.itemsize == self.numel * self.dtype.itemsize
        # Eight lines make a pattern of the swizzle; what is addressed by itself must be whole ones.
        assert prod(shape[1:]) * dtype.itemsize % (8 * layout.swizzle_byte_width) == 0
        return Shared(self.memory, self.first, dtype, shape)

    def permute(self, order: tuple[int, ...]) -> Shared:
        assert order == (1, 0)
        return Shared(self.memory, self.first, self.dtype, self.shape, not self.turned)

    def view(self) -> Tensor:
        """The elements; writes go to the memory."""
        count = self.numel * self.dtype.itemsize
        found = self.memory[self.first : self.first + count].view(self.dtype).view(self.shape)
        return found.t() if self.turned else found


@dataclass
class Barrier:
    """What the chip keeps in 8 bytes: phases that end when all have arrived and all bytes have landed."""

    count: int
    arrivals: int = 0
    bytes: int = 0
    phase: int = 0
    copies: list[tuple[Shared, Tensor]] = field(default_factory=list)

    def arrive(self) -> None:
        self.arrivals += 1
        assert self.arrivals <= self.count, "more arrive than a phase waits for"
        self.settle()

    def land(self) -> None:
        for to, box in self.copies:
            to.view().copy_(box)
            self.bytes -= to.numel * to.dtype.itemsize
        self.copies = []
        self.settle()

    def settle(self) -> None:
        if self.arrivals == self.count and self.bytes == 0:
            self.arrivals, self.phase = 0, self.phase ^ 1


class Parts:
    """The parts of a program: threads of which one runs, until it waits for what is not there."""

    def __init__(self, count: int, lazy: bool) -> None:
        self.lazy, self.current, self.alive = lazy, 0 if lazy else count - 1, set(range(count))
        self.turn = threading.Condition()
        self.idle, self.error = 0, None

    def run(self, part: int, function: Callable[[], None]) -> None:
        with self.turn:
            try:
                self.turn.wait_for(lambda: self.current == part or self.error)
                if not self.error:
                    function()
            except BaseException as error:
                self.error = self.error or error
            self.alive.discard(part)
            self.idle = 0
            self.current = min(self.alive, default=-1)
            self.turn.notify_all()

    def wait(self, part: int, ready: Callable[[], bool]) -> None:
        while not ready():
            self.idle += 1
            others = self.alive - {part}
            if not others or self.idle > 2 * len(self.alive):
                raise RuntimeError(f"deadlock: part {part} waits for what never comes")
            self.current = min(others)
            self.turn.notify_all()
            self.turn.wait_for(lambda: self.current == part or self.error)
            if self.error:
                raise RuntimeError("another part has failed")
        self.idle = 0


class Twin:
    """One launch: shared memory and barriers of a program at a time."""

    def __init__(self, programs: int, warps: int, lazy: bool) -> None:
        self.programs, self.warps, self.lazy, self.program = programs, warps, lazy, 0
        self.barriers: dict[tuple[int, int], Barrier] = {}  # by what holds them
        self.stages: dict[int, list[Shared]] = {}  # of a `full` barrier: what its copies wrote last
        self.parts: Parts | None = None
        self.local = threading.local()

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        count = prod(shape) * dtype.itemsize
        return Shared(torch.full((count,), 255, dtype=torch.uint8), 0, dtype, list(shape))

    def barrier(self, shared: Shared) -> Barrier:
        return self.barriers[id(shared.memory), shared.first]

    def init(self, shared: Shared, count: int) -> None:
        self.barriers[id(shared.memory), shared.first] = Barrier(count)

    def expect(self, shared: Shared, count: int) -> None:
        barrier = self.barrier(shared)
        barrier.bytes += count
        barrier.arrive()
        self.stages[shared.first] = []

    def copy(self, descriptor: Descriptor, corner: list[int], shared: Shared, to: Shared) -> None:
        assert to.shape == descriptor.block_shape, (to.shape, descriptor.block_shape)
        barrier = self.barrier(shared)
        barrier.copies.append((to, descriptor.box(corner)))
        self.stages[shared.first].append(to)
        if not self.lazy:
            barrier.land()

    def wait(self, shared: Shared, phase: int) -> None:
        barrier = self.barrier(shared)

        def ready() -> bool:
            if barrier.phase == int(phase):
                barrier.land()
            return barrier.phase != int(phase)

        assert self.parts is not None
        self.parts.wait(self.local.part, ready)

    def arrive(self, shared: Shared, count: int) -> None:
        assert count == 1
        if self.lazy:  # from here on the stage may be anything
            for piece in self.stages.get(shared.first, ()):
                piece.view().fill_(torch.nan)
        self.barrier(shared).arrive()

    def multiply(self, a: Shared, b: Shared, acc: Any, is_async: bool) -> Any:
        assert is_async
        shape = b.shape[::-1] if b.turned else b.shape
        assert a.shape == [64, shape[0]]
        products = acc if isinstance(acc, list) else [acc]
        return [*products, (a, b) if self.lazy else a.view().float() @ b.view().float()]

    def settle(self, left: int, deps: tuple[list, ...]) -> tuple[Tensor, ...]:
        assert left == 0
        done = []
        for sums, *products in deps:
            for one in products:
                sums = sums + (one if isinstance(one, Tensor) else one[0].view().float() @ one[1].view().float())
            done.append(sums)
        return tuple(done)

    def specialize(self, parts: list[tuple[Callable, tuple]], warps: list[int], registers: list[int]) -> None:
        assert len(parts) == 2
        assert all(count % 8 == 0 for count in registers)
        self.parts = Parts(len(parts), self.lazy)

        def start(i: int) -> None:
            self.local.part = i
            self.parts.run(i, lambda: parts[i][0](*parts[i][1]))

        threads = [threading.Thread(target=start, args=(i,)) for i in range(len(parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.parts.error:
            raise self.parts.error

    def language(self) -> SimpleNamespace:
        """`tl` and `gl`: what the kernels use of them."""
        layout = lambda *a, **k: SimpleNamespace(given=(a, k))  # noqa: E731
        nvmma = lambda shape, dtype: SimpleNamespace(swizzle_byte_width=min(128, shape[-1] * dtype.itemsize))  # noqa: E731
        maximum = lambda a, b, **_: torch.maximum(torch.as_tensor(a), torch.as_tensor(b))  # noqa: E731
        return SimpleNamespace(
            constexpr=None, float32=torch.float32, int32=torch.int32, int64=torch.int64, static_range=range, load=load,
            store=store, where=where, maximum=maximum, minimum=lambda a, b: min(int(a), int(b)),
            cdiv=lambda a, b: -(-int(a) // int(b)), arange=lambda a, b, _=None: torch.arange(a, b),
            zeros=lambda shape, dtype, _=None: torch.zeros(list(shape), dtype=dtype),
            program_id=lambda _: self.program, num_programs=lambda _: self.programs, num_warps=lambda: self.warps,
            PropagateNan=SimpleNamespace(ALL=None), NVMMADistributedLayout=layout, BlockedLayout=layout,
            SliceLayout=layout, NVMMASharedLayout=SimpleNamespace(get_default_for=nvmma),
            convert_layout=lambda x, _: x, allocate_shared_memory=self.allocate, warp_specialize=self.specialize,
            thread_barrier=lambda: None,
        )  # fmt: skip

    def functions(self) -> dict[str, Any]:
        """All functions of the kernel's files, over this twin."""
        same = lambda f=None, **_: f if callable(f) else lambda g: g  # noqa: E731
        names: dict[str, Any] = {
            "tl": self.language(), "gl": self.language(), "triton": SimpleNamespace(jit=same),
            "gluon": SimpleNamespace(jit=same), "warpgroup_mma": self.multiply, "warpgroup_mma_wait": self.settle,
            "tma": SimpleNamespace(async_copy_global_to_shared=self.copy),
            "mbarrier": SimpleNamespace(
                init=self.init, expect=self.expect, wait=self.wait, arrive=self.arrive, MBarrierLayout=lambda: None
            ),
        }  # fmt: skip
        for file in FILES:
            source = (Path(kernels.__file__).parent / file).read_text(encoding="utf-8")
            lines = [line for line in source.splitlines() if not line.startswith(("import ", "from "))]
            exec(compile("\n".join(lines), file, "exec"), names)
        names["pick"] = lambda values, index: torch.as_tensor(values[int(index)])
        return names


def run(launch: Any, like: Tensor | None = None, *, schedule: str) -> None:
    """A launch of the convolution on strips, on tensors of a CPU: one program after the other."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    given = dict(launch.arguments)
    warps = given.pop("num_warps")
    given.pop("maxnreg", None)
    for name, value in given.items():
        if isinstance(value, TensorDescriptor):
            given[name] = Descriptor(
                pointer(value.base), list(value.shape), list(value.strides), list(value.block_shape), value.layout
            )
        elif isinstance(value, Tensor):
            given[name] = pointer(value)
    twin = Twin(launch.programs, warps, schedule == "lazy")
    kernel = twin.functions()["strip_kernel"]
    for twin.program in range(launch.programs):
        kernel(**given)
