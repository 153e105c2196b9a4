"""Models of torchvision, timm, transformers and pytorchcv, converted: each promise of `den_kernels.convert`, checked.

    PYTHONPATH=. python scripts/foreign_models.py [PACKAGE/MODEL ...] [--size 224] [--out FILE.md]

Weights are random, the statistics of batch norms and layer scales unlike new ones. For each model:

full       without levels, and at the highest, the output is the original's bit for bit
levels     at random levels it is that of the original in float64 with hidden channels masked by hooks; the error is at
           most four times that of the same masked model in float32
order      sorted by importance (`order="l1"`) the function is the same
extract    the plain module of one structure computes the same, in evaluation, and in training with its statistics
freeze     the frozen copy computes the same at random levels
export     so does what torch.export makes of the frozen copy, for another batch, and of a batch of another size

The masks are put where the blocks of these packages have their hidden maps (`TAPS`), not where `convert` found any. The
packages must fit the torch that is installed; the library and its tests need none of them.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

import den_kernels
from benchmarks import packages
from den.support.tables import markdown_table
from den_kernels.convert import Block
from den_kernels.testing import assert_as_accurate, channel_mask
from tests.oracle import unlike_new

GROUPS, BATCH = 4, 4
MODELS = (
    *(f"torchvision/{name}" for name in ("resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2",
                                         "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny", "regnet_x_400mf",
                                         "regnet_y_400mf")),
    *(f"timm/{name}" for name in ("resnet18", "resnet50", "mobilenetv2_100", "mobilenetv3_large_100", "efficientnet_b0",
                                  "convnext_tiny", "regnetx_002", "regnety_002")),
    "transformers/resnet-50",
    *(f"pytorchcv/{name}" for name in ("resnet56_cifar10", "wrn16_10_cifar10", "resnext29_32x4d_cifar10",
                                       "mobilenetv2_w1", "efficientnet_b0")),
)  # fmt: skip


def build(name: str) -> nn.Module:
    """The model PACKAGE/MODEL with seeded weights, in evaluation mode; no norm or scale is as at its beginning."""
    torch.manual_seed(0)
    made = packages.build(name)
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if key.endswith(("layer_scale", "gamma")):
                parameter.uniform_(0.5, 1.5)
    return unlike_new(made).eval()


def side(name: str, size: int) -> int:
    """The side of a model's images."""
    return 32 if name.endswith("cifar10") else size


# Where the blocks of a class have their hidden maps, behind norm and activation, and whose result is the branch: paths
# inside the block. "relu" is called for each hidden map, and once more for the sum.
Taps = tuple[tuple[str, ...], str]
TAPS: dict[str, Callable[[nn.Module], Taps]] = {
    "torchvision.models.resnet.BasicBlock": lambda block: (("relu",), "bn2"),
    "torchvision.models.resnet.Bottleneck": lambda block: (("relu", "relu"), "bn3"),
    "torchvision.models.mobilenetv2.InvertedResidual": lambda block: (_activated(block.conv, "conv"), "conv"),
    "torchvision.models.mobilenetv3.InvertedResidual": lambda block: (_activated(block.block, "block"), "block"),
    "torchvision.models.efficientnet.MBConv": lambda block: (_activated(block.block, "block"), "block"),
    "torchvision.models.convnext.CNBlock": lambda block: (("block.4",), "block"),
    "torchvision.models.regnet.ResBottleneckBlock": lambda block: (("f.a", "f.b"), "f"),
    "timm.models.resnet.BasicBlock": lambda block: (("act1",), "bn2"),
    "timm.models.resnet.Bottleneck": lambda block: (("act1", "act2"), "bn3"),
    "timm.models._efficientnet_blocks.InvertedResidual": lambda block: (("bn1", "bn2"), "bn3"),
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": lambda block: (("bn1",), "bn2"),
    "timm.models.convnext.ConvNeXtBlock": lambda block: (("mlp.act",), "mlp"),
    "timm.models.regnet.Bottleneck": lambda block: (("conv1", "conv2"), "conv3"),
    "transformers.models.resnet.modeling_resnet.ResNetBottleNeckLayer": lambda block: (("layer.0", "layer.1"), "layer"),
    "pytorchcv.models.resnet.ResUnit": lambda block: (
        (("body.conv1", "body.conv2") if hasattr(block.body, "conv3") else ("body.conv1",)), "body"
    ),
    "pytorchcv.models.preresnet.PreResUnit": lambda block: (("body.conv2.activ",), "body.conv2"),
    "pytorchcv.models.resnext.ResNeXtUnit": lambda block: (("body.conv1", "body.conv2"), "body"),
    "pytorchcv.models.mobilenetv2.LinearBottleneck": lambda block: (("conv1", "conv2"), "conv3"),
    "pytorchcv.models.efficientnet.EffiInvResUnit": lambda block: (("conv1", "conv2"), "conv3"),
    "pytorchcv.models.efficientnet.EffiDwsConvUnit": lambda block: (("dw_conv",), "pw_conv"),
}  # fmt: skip


def _activated(parts: nn.Sequential, name: str) -> tuple[str, ...]:
    """The parts of a sequence that end in an activation: norms of a projection do not."""
    ends = ("ReLU", "ReLU6", "Hardswish", "SiLU")
    return tuple(
        f"{name}.{i}"
        for i, part in enumerate(parts)
        if isinstance(part, nn.Sequential) and type(part[-1]).__name__ in ends
    )


def taps_of(block: nn.Module) -> Taps:
    """The taps of a block; KeyError for a class that is not known here."""
    kind = type(block)
    return TAPS[f"{kind.__module__}.{kind.__name__}"](block)


@contextmanager
def masked(model: nn.Module, blocks: tuple[Block, ...], levels: Tensor) -> Iterator[None]:
    """Inside the context hidden channels that levels [B, N] leave out, and branches at level 0, are 0."""
    with ExitStack() as stack:
        for n, found in enumerate(blocks):
            block = model.get_submodule(found.name)
            hidden, tail = taps_of(block)
            if len(hidden) != len(found.groups):
                raise AssertionError(f"{found.name}: {len(hidden)} hidden maps, {len(found.groups)} reported")
            for path in dict.fromkeys(hidden):
                sizes = [found.groups[i] for i, each in enumerate(hidden) if each == path]
                hook = block.get_submodule(path).register_forward_hook(Mask(levels[:, n], sizes))
                stack.callback(hook.remove)
            close = Mask((levels[:, n] > 0).int(), [])
            stack.callback(block.get_submodule(tail).register_forward_hook(close).remove)
        yield


class Mask:
    """A hook that sets to 0 what levels [B] leave out: of the i-th call in the channel groups sizes[i], then nothing;
    without sizes whole results, at level 0."""

    def __init__(self, levels: Tensor, sizes: list[tuple[int, ...]]) -> None:
        self.levels, self.sizes, self.calls = levels, sizes, 0

    def __call__(self, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        call, self.calls = self.calls, self.calls + 1
        if not self.sizes:
            return torch.where((self.levels > 0).view(-1, *[1] * (y.ndim - 1)), y, 0)
        if call >= len(self.sizes):
            return y
        mask = channel_mask(self.levels, self.sizes[call])
        axis = 1 if y.shape[1] == mask.shape[1] else y.ndim - 1
        shape = [1] * y.ndim
        shape[0], shape[axis] = mask.shape
        return torch.where(mask.view(shape), y, 0)


def at(model: nn.Module, x: Tensor, levels: Tensor | None) -> Tensor:
    """The logits of images x [B, C, H, W] at levels [B, N]; None: without any."""
    if levels is None:
        return model(x)
    with den_kernels.levels(model, levels):
        return model(x)


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    """Raise AssertionError unless two results are the same to rounding, of the largest element."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


class Case:
    """A model, the same converted, images and random levels; `check_*` raise where a promise does not hold."""

    def __init__(self, name: str, size: int) -> None:
        self.original = build(name)
        self.x = torch.randn(BATCH, 3, side(name, size), side(name, size), generator=torch.Generator().manual_seed(0))
        self.model = copy.deepcopy(self.original)
        self.report = den_kernels.convert(self.model, GROUPS, example=self.x[:1])
        generator = torch.Generator().manual_seed(0)
        lowest = torch.tensor(self.report.lowest)
        levels = torch.randint(0, GROUPS + 1, (BATCH, len(lowest)), generator=generator)
        levels[0], levels[1] = 0, GROUPS
        self.levels = levels.maximum(lowest)
        self.structure = self.levels[2]

    def check_full(self) -> None:
        for levels in (None, torch.full_like(self.levels, GROUPS)):
            assert torch.equal(at(self.model, self.x, levels), self.original(self.x))

    def check_levels(self) -> None:
        exact, blocks = copy.deepcopy(self.original).double(), self.report.blocks
        with masked(exact, blocks, self.levels):
            wanted = exact(self.x.double())
        with masked(self.original, blocks, self.levels):
            peer = self.original(self.x)
        got = at(self.model, self.x, self.levels)
        assert (got - self.original(self.x)).abs().max() > 1e-3 * wanted.abs().max(), "the levels had no effect"
        assert_as_accurate(got, peer, wanted, wanted.abs().amax().expand_as(wanted), factor=4)

    def check_order(self) -> None:
        model = copy.deepcopy(self.original)
        den_kernels.convert(model, GROUPS, example=self.x[:1], order="l1")
        close(at(model, self.x, None), self.original(self.x))

    def check_extract(self) -> None:
        own = self.structure.expand_as(self.levels)
        plain = den_kernels.extract(self.model, self.structure)
        close(plain(self.x), at(self.model, self.x, own))
        trained, plain = copy.deepcopy(self.model).train(), plain.train()
        results = []
        for call in (lambda: at(trained, self.x, own), lambda: plain(self.x)):
            torch.manual_seed(0)  # of dropout and stochastic depth
            results.append(call())
        close(*results, tolerance=1e-3)
        close(at(trained.eval(), self.x, own), plain.eval()(self.x), tolerance=1e-3)

    def check_freeze(self) -> None:
        frozen = den_kernels.freeze(self.model, self.x[:1])
        for levels in (self.levels, None):
            close(at(frozen, self.x.clone(), levels), at(self.model, self.x, levels))

    def check_export(self) -> None:
        frozen = den_kernels.WithLevels(den_kernels.freeze(self.model, self.x[:1]))
        batch = {0: Dim("batch", min=1, max=64)}
        program = torch.export.export(frozen, (self.x[:2], self.levels[:2]), dynamic_shapes=(batch, batch))
        x, levels = self.x.flip(0)[:3], self.levels.flip(0)[:3]
        close(program.module()(x.clone(), levels), at(self.model, x, levels))


CHECKS = ("full", "levels", "order", "extract", "freeze", "export")


def row_of(name: str, size: int) -> list[str]:
    """The cells of a model: name, side of the images, blocks, those that one op runs, left alone, then yes or no."""
    start = time.perf_counter()
    try:
        case = Case(name, size)
    except ValueError as why:  # no block was found
        print(f"{name}: {why}", file=sys.stderr)
        return [name, str(side(name, size)), "0", "0", "", *["**no**"] * len(CHECKS)]
    fused = sum(block.kernel != "dynamic convolutions" for block in case.report)
    cells = [name, str(case.x.shape[-1]), str(len(case.report)), str(fused), str(len(case.report.left))]
    for check in CHECKS:
        try:
            with torch.no_grad():
                getattr(case, f"check_{check}")()
            cells.append("yes")
        except Exception as why:  # what does not hold is a row of the table
            print(f"{name}: {check}: {type(why).__name__}: {why}", file=sys.stderr)
            cells.append("**no**")
    print(f"{' | '.join(cells)}   ({time.perf_counter() - start:.0f} s)", flush=True)
    for left in case.report.left:
        print(f"    left alone: {left.name or 'model'}: {left.reason}", flush=True)
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="PACKAGE/MODEL")
    parser.add_argument("--size", type=int, default=224, help="side of the images; of models for CIFAR 32")
    parser.add_argument("--out", type=Path, help="Markdown file of the table, written after each model")
    options = parser.parse_args()
    rows = []
    for name in options.models:
        rows.append(row_of(name, options.size))
        if options.out:  # after each, so that a run that is stopped leaves what it has
            options.out.write_text(page(rows), encoding="utf-8")
    return int(any("**no**" in row for row in rows))


def page(rows: list[list[str]]) -> str:
    """The table and what it was made with, in Markdown."""
    packages = ("torch", "torchvision", "timm", "transformers", "pytorchcv")
    made = ", ".join(f"{package} {version(package)}" for package in packages)
    header = ["model", "images", "blocks", "one op", "left alone", *CHECKS]
    return f"""# Models of other packages

What `scripts/foreign_models.py` checks of each model, in square images of that side, a batch of {BATCH}, {GROUPS}
channel groups, random weights, on a CPU; the script says what each column means. "One op": blocks that run as one op,
the others layer by layer. {made}.

{markdown_table(header, rows)}
"""


if __name__ == "__main__":
    raise SystemExit(main())
