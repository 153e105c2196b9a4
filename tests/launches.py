"""The launches of the Triton kernels that a network makes, caught without a GPU, and their machine code."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from den.nn.backbones import BACKBONES
from den.nn.blocks import BlockShape
from den_kernels import DynamicBatchNorm2d, DynamicConv2d, ResidualWeights
from den_kernels._geometry import Geometry
from den_kernels._triton import convolve, dynamic_conv, norm, residual, weight_gradient
from den_kernels._triton.launch import Launch
from den_kernels.plan import Route
from tests.wgmma_hazards import parse

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
POINTERS |= {torch.uint8: "*u8"}
PRODUCT = re.compile(r"HGMMA|HMMA|UTC\w*MMA")
META = torch.device("meta")
BATCH = 256


class Code(NamedTuple):
    """What a compiled kernel is made of."""

    registers: int
    stack: int  # bytes: spilled registers and local arrays
    shared: int  # bytes
    instructions: Counter
    listing: str  # of nvdisasm

    @property
    def names(self) -> str:
        return " ".join(self.instructions)


class Loop(NamedTuple):
    """An innermost loop that multiplies."""

    slots: int  # instructions that a warp issues in a turn
    products: tuple[str, ...]  # names of its matrix instructions


def product_loops(code: Code) -> list[Loop]:
    """The loops of a kernel that multiply, one for each rung: for each product the shortest one that holds it.

    Longer ones are those around, and retries of a wait that jump back into the loop.
    """
    instructions, labels = parse(code.listing)
    spans = []
    for end, one in enumerate(instructions):
        target = re.search(r"`\((\.L_x_\d+)\)", one.operands) if one.name.split(".")[0] == "BRA" else None
        if target and labels[target[1]] <= end:
            spans.append(range(labels[target[1]], end + 1))
    loops, seen = [], set()
    for span in sorted(spans, key=len):
        products = [i for i in span if PRODUCT.match(instructions[i].name)]
        if products and not seen.intersection(products):
            seen.update(products)
            loops.append(Loop(len(span), tuple(instructions[i].name for i in products)))
    return loops


def compile_launch(launch: Launch, arch: int) -> Code:
    """Compile what a launch would run on an architecture, and take the result apart."""
    arguments = {"num_stages": 1} | launch.arguments
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in arguments}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = arguments[parameter.name]
        if hasattr(value, "block_shape"):
            kind = POINTERS[value.base.dtype].removeprefix("*")
            layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
            signature[parameter.name] = f"tensordesc<{kind}{list(value.block_shape)}{layout}>"
            continue
        if (
            parameter.is_constexpr
            or value is None
            or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize)
        ):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        signature[parameter.name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
        known = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        if known and (isinstance(value, Tensor) or value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    made = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = made(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return disassemble(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options))


def disassemble(compiled) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage = run(str(TOOLS / "cuobjdump"), "-res-usage", str(cubin))
        listing = run(str(TOOLS / "nvdisasm"), "-c", str(cubin))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    instructions = Counter(re.findall(r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE))
    return Code(registers, stack, compiled.metadata.shared, instructions, listing)


class Caught:
    """While it is entered, launches do not run but are kept; meta tensors count as those of a GPU."""

    def __init__(self, arch: int) -> None:
        self.launches: list[Launch] = []
        self.arch, self.patches = arch, ExitStack()

    def __enter__(self) -> list[Launch]:
        def run(launch: Launch, like: Tensor) -> dict:
            self.launches.append(launch)
            return launch.arguments

        self.patches.enter_context(patch.object(Launch, "run", run))
        for module in (convolve, residual, weight_gradient, norm):
            self.patches.enter_context(patch.object(module, "architecture", lambda device: (self.arch, 132)))
        return self.launches

    def __exit__(self, *_: object) -> None:
        self.patches.close()


def meta_route(groups: int, masked: bool) -> Route:
    """Of BATCH instances."""
    indices = lambda n: torch.empty(n, dtype=torch.int32, device=META)  # noqa: E731
    if masked:
        mask = torch.empty(BATCH, groups, dtype=torch.bool, device=META)
        return Route(indices(BATCH), indices(BATCH), indices(BATCH + 1), groups, mask)
    return Route(indices(BATCH), indices(BATCH), indices(groups + 2), groups)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """On the meta device, channels-last."""
    return torch.empty(shape, dtype=dtype, device=META).contiguous(memory_format=torch.channels_last)


def train_convolution(conv: DynamicConv2d, x: Tensor, route: Route) -> Tensor:
    """Forward and both gradients; the output."""
    sides = tuple(conv.out_groups or ()), tuple(conv.in_groups or ())
    geometry = Geometry(conv.stride, conv.padding, conv.dilation, conv.groups, *sides)
    y = dynamic_conv.forward(x, conv.weight, None, route, geometry)
    dynamic_conv.backward(y, x, conv.weight, route, geometry, (True, True, False))
    return y


def train_norm(bn: DynamicBatchNorm2d, x: Tensor, route: Route) -> None:
    """Forward and backward of a training step."""
    vector = torch.empty(x.shape[1], device=META)
    around = vector, vector, tuple(bn.groups), 1e-5, True
    selection = route.selection()
    _, statistics = norm.forward(x, selection, None, *around)
    norm.backward(x, x, selection, statistics, *around, True, True, True)


def run_block(block: nn.Module, shape: BlockShape, dtype: torch.dtype, masked: bool) -> None:
    """A training step of a block, layer by layer, and, of a basic residual block, inference."""
    route = meta_route(len(block.conv1.out_groups), masked)
    x = stream = empty(BATCH, shape.in_channels, shape.in_size, shape.in_size, dtype=dtype)
    if block.bn1 is not None:
        train_norm(block.bn1, x, route.active())
    for conv, bn in block.layers():
        x = train_convolution(conv, x, route)
        if bn is not None:
            train_norm(bn, x, route)
    if len(block.layers()) == 2:
        weights = ResidualWeights.fold(block.conv1, block.bn1, block.conv2, block.bn2)
        residual.add_branch(stream, x, route, weights)
        if block.bn1 is not None and weights.scale1 is not None:
            norm.pool(stream, weights.scale1, weights.scale1)
        handed = residual.hands_on(route, weights)
        if handed and x.shape != stream.shape:  # pools its shortcut itself, beside what the next block reads
            vector = torch.empty(x.shape[1], device=META)
            after = residual.Next(vector, vector, route.levels)
            residual.add_branch(stream, x, route, weights, following=after, holds_shortcut=False)
        if (
            handed and block.bn1 is not None and x.shape == stream.shape
        ):  # and what it writes where another such block follows
            residual.add_branch(stream, x, route, weights, following=residual.Next.of(weights, route))


def block_kinds(network: str) -> tuple[BlockShape, ...]:
    """The different blocks of a network on maps of 32 x 32, in order."""
    backbone = BACKBONES[network]
    return tuple(dict.fromkeys(backbone.shapes(backbone.stages, backbone.stem, 32)))


def launches_of(
    network: str, dtype: torch.dtype, arch: int, masked: bool = False, only: int | None = None
) -> list[Launch]:
    """Every launch of a network's blocks, or of one kind of them, in training and inference, each kernel once."""
    with Caught(arch) as caught:
        for i, shape in enumerate(block_kinds(network)):
            if only is not None and i != only:
                continue
            block = shape.build(4, first=i == 0).to(META, memory_format=torch.channels_last).eval()
            for module in block.modules():
                if isinstance(module, nn.Conv2d):
                    module.to(dtype)
            run_block(block, shape, dtype, masked)
    return list({identity(launch): launch for launch in caught}.values())


def identity(launch: Launch) -> tuple:
    """What makes two launches the same machine code: all but sizes and addresses."""
    return (launch.kernel.fn.__name__, *_constants(launch))


def _constants(launch: Launch) -> Iterator[object]:
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if hasattr(value, "block_shape"):
            yield value.base.dtype, tuple(value.block_shape)
        elif isinstance(value, Tensor):
            yield value.dtype
        elif parameter.is_constexpr or value is None:
            yield value
        elif not parameter.do_not_specialize:
            yield 1 if value == 1 else value % 16 == 0
    yield from (launch.arguments.get(name, 1) for name in ("num_warps", "num_stages", "maxnreg"))


def describe(launch: Launch) -> str:
    """A name for reports: the kernel and what it is about."""
    a = launch.arguments
    picked = ("NC", "KC", "C", "R", "STRIDE_H", "CARDINALITY", "TRANSPOSED", "MASKED", "LISTS", "RELU", "ADD", "NEXT")
    kind = next((a[name].dtype for name in ("source", "x", "out") if name in a), torch.float32)
    sizes = " ".join(f"{name}={a[name]}" for name in picked if name in a)
    return f"{launch.kernel.fn.__name__} {str(kind).removeprefix('torch.')} {a.get('PRECISION', '')} {sizes}"
