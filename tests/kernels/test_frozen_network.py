"""Frozen models that are one call from the images to the logits: which ones are, and that it changes nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den_kernels import WithLevels, convert, freeze, levels
from den_kernels._extension import extension
from den_kernels.building import DenseConv, DenseHead, TaskNetwork
from den_kernels.convert.frozen_network import FrozenNetwork
from den_kernels.testing import float32_limited_to
from tests.foreign_models import foreign, images, random_levels
from tests.oracle import unlike_new
from tests.stand_ins import PlainBasicBlock, PlainBottleneck

pytestmark = pytest.mark.skipif(
    extension is None or not extension.has_direct_float32(), reason="needs the extension on a CPU with AVX2"
)


class Network(nn.Module):
    """As torchvision writes a ResNet, but for one thing."""

    def __init__(self, what: str = "", block: type[nn.Module] = PlainBasicBlock, width: int = 16) -> None:
        super().__init__()
        self.what = what
        kernel = 9 if what == "more than 49 taps" else 7
        self.conv1 = nn.Conv2d(3, width, kernel, 2, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.SiLU() if what == "another activation" else nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=what == "a pooling that rounds up")
        self.layers = nn.Sequential(block(width, width), block(width, 2 * width, 2), block(2 * width, 2 * width))
        whole = what in ("a pooling of one size", "a pooling of part of the map")
        side = 2 if what == "a pooling of part of the map" else 4
        self.avgpool = nn.AvgPool2d(side, 1) if whole else nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(2 * width * (9 if what == "a pooling of part of the map" else 1), 7)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        first = self.conv1(x)
        y = F.relu(self.bn1(first)) if self.what == "a function" else self.relu(self.bn1(first))
        y = self.maxpool(y)
        last = self.layers(y)
        y = self.avgpool(last)
        y = y.view(y.shape[0], -1) if self.what == "a view" else torch.flatten(y, 1)
        logits = self.fc(self.dropout(y))
        return (logits, last.mean()) if self.what == "a second result" else logits


def frozen_of(model: nn.Module, x: Tensor, groups: int = 4) -> tuple[nn.Module, nn.Module, Tensor]:
    """The converted model, it frozen, and levels for x."""
    report = convert(model, groups, example=x[:1])
    return model, freeze(model, x[:1]), random_levels(len(x), report.lowest, groups)


def call_of(frozen: nn.Module) -> FrozenNetwork | None:
    found = [m for m in frozen.modules() if isinstance(m, FrozenNetwork)]
    assert len(found) <= 1
    return found[0] if found else None


@torch.no_grad()
def run(model: nn.Module, x: Tensor, own: Tensor) -> Tensor:
    with levels(model, own):
        result = model(x.clone())
    return result[0] if isinstance(result, tuple) else result


def assert_near(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


ALIKE = ("", "a view", "a pooling of one size")
OTHERS = ("a function", "another activation", "more than 49 taps", "a pooling that rounds up",
          "a pooling of part of the map", "a second result")  # fmt: skip


@pytest.mark.parametrize("block", [PlainBasicBlock, PlainBottleneck])
@pytest.mark.parametrize("what", [*ALIKE, *OTHERS])
def test_a_network_is_one_call_where_all_its_layers_are_of_kinds_that_this_runs(what, block):
    torch.manual_seed(0)
    x = torch.randn(5, 3, 32, 32)
    model, frozen, own = frozen_of(unlike_new(Network(what, block)).eval(), x)
    assert (call_of(frozen) is not None) == (what in ALIKE)
    assert_near(run(frozen, x, own), run(model, x, own))
    assert_near(run(frozen, x, torch.full_like(own, 4)), run(model, x, torch.full_like(own, 4)))


@pytest.mark.parametrize("name", ["pytorchcv_resnet", "pytorchcv_resnext"])
def test_networks_of_packages_are_one_call(name):
    x = images(name)
    _, frozen, own = frozen_of(foreign(name), x)
    call = call_of(frozen)
    assert call is not None
    seen = []
    handle = call.steps[0].register_forward_hook(lambda *_: seen.append(1))
    by_steps = run(frozen, x, own)
    handle.remove()
    assert seen == [1]
    assert_near(run(frozen, x, own), by_steps)


def calls_of(call: FrozenNetwork, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which each call of C++ adds the number of its images."""
    made: list[int] = []

    def counted(self: TaskNetwork, tasks, given, levels=None):
        made.append(len(given[0]))
        return self._run(tasks, given, levels)

    monkeypatch.setattr(TaskNetwork, "__call__", counted)
    return made


@pytest.mark.parametrize(
    "what", ["as it is", "a hook", "masks", "another size", "another size, pooled", "traced", "autocast", "a gradient"]
)
def test_steps_run_one_by_one_where_one_call_does_not_do_what_they_do(what, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(5, 3, 32, 32)
    model, frozen, own = frozen_of(unlike_new(Network("a pooling of one size" if "pooled" in what else "")).eval(), x)
    call = call_of(frozen)
    assert call is not None
    made = calls_of(call, monkeypatch)
    if what == "a hook":
        call.steps[-1].register_forward_hook(lambda module, args, y: y + 1)
        assert_near(run(frozen, x, own), run(model, x, own) + 1)
    elif what == "masks":
        masks = torch.rand(*own.shape, 4, generator=torch.Generator().manual_seed(0)) < 0.5
        assert_near(run(frozen, x, masks), run(model, x, masks))
    elif what == "traced":
        with torch.no_grad(), levels(model, own):
            wanted = model(x)
        program = torch.export.export(WithLevels(frozen), (x, own), strict=False)
        with torch.no_grad():
            assert_near(program.module()(x, own), wanted)
    elif what == "autocast":
        with torch.no_grad(), levels(frozen, own), torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError):
            frozen(x)  # as the blocks alone
    elif what == "a gradient":
        with levels(frozen, own), pytest.raises(ValueError, match="must not require a gradient"):
            frozen(x.requires_grad_())
    elif what == "another size, pooled":
        with pytest.raises(RuntimeError):  # the linear layer's, as in the model itself
            run(frozen, torch.randn(5, 3, 64, 64), own)
    else:
        given = x if what == "as it is" else torch.randn(5, 3, 47, 38)
        assert_near(run(frozen, given, own), run(model, given, own))
    assert made == ([5] if what in ("as it is", "another size") else [])


@pytest.mark.parametrize("block", [PlainBasicBlock, PlainBottleneck])
def test_results_are_the_same_bits_however_the_batch_is_cut_and_shared(block):
    torch.manual_seed(0)
    x = torch.randn(9, 3, 48, 40)
    _, frozen, own = frozen_of(unlike_new(Network("", block)).eval(), x)
    whole, order = run(frozen, x, own), torch.randperm(9)
    assert torch.equal(run(frozen, x[order], own[order]), whole[order])
    assert torch.equal(torch.cat([run(frozen, x[i : i + 1], own[i : i + 1]) for i in range(9)]), whole)
    assert torch.equal(run(copy.deepcopy(frozen), x, own), whole)
    assert run(frozen, x[:0], own[:0]).shape == (0, 7)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(frozen, x, own), whole)
            assert torch.equal(run(frozen, x[:1], own[:1]), whole[:1])
    finally:
        torch.set_num_threads(threads)


def stem_alone(conv: nn.Conv2d, pool: tuple[int, int, int]) -> TaskNetwork:
    """A network of a convolution, its ReLU and pooling, and the mean of each channel."""
    weight, channels = conv.weight.detach(), conv.out_channels
    stem = DenseConv.of(conv, weight, conv.bias.detach(), pool)
    return TaskNetwork((stem,), (), (DenseHead(torch.eye(channels).to(weight), torch.zeros(channels).to(weight)),))


def means(conv: nn.Conv2d, pool: tuple[int, int, int], x: Tensor) -> Tensor:
    y = conv(x).relu()
    return (F.max_pool2d(y, *pool) if pool[0] else y).mean((2, 3))


STEMS = {  # channels, outputs, kernel, stride, padding; pooling; map
    "CIFAR": ((3, 16, 3, 1, 1), (0, 1, 0), (32, 32)),
    "ImageNet": ((3, 24, 7, 2, 3), (3, 2, 1), (45, 38)),
    "one channel, no padding": ((1, 5, 5, 1, 0), (2, 2, 0), (13, 9)),
    "a large pooling": ((4, 16, 3, 3, 1), (5, 3, 2), (29, 31)),
    "more rows than a band has": ((3, 64, 3, 1, 1), (3, 2, 1), (150, 131)),
    "15 channels": ((15, 33, 3, 2, 1), (3, 1, 0), (12, 17)),
    "16 channels": ((16, 16, 3, 1, 1), (2, 1, 1), (6, 5)),
    "1 x 1": ((3, 8, 1, 1, 0), (3, 3, 0), (9, 9)),
}


@pytest.mark.parametrize("isa", ["AVX2", "AVX-512"])
@pytest.mark.parametrize("name", STEMS)
def test_a_convolution_and_the_pooling_behind_it(name, isa):
    sizes, pool, side = STEMS[name]
    torch.manual_seed(0)
    conv, x = nn.Conv2d(*sizes), torch.randn(3, sizes[0], *side)
    with float32_limited_to(isa), torch.no_grad():
        if extension.float32_isa() != isa:
            pytest.skip(f"this CPU has no {isa}")
        network = stem_alone(conv, pool)
        [got] = network([0], [x])
        exact = means(copy.deepcopy(conv).double(), pool, x.double())
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)
        x[1, 0, 3, 4] = torch.nan  # as large as any value
        [got] = network([0], [x])
        assert torch.equal(got.isnan(), means(conv, pool, x).isnan())


@torch.no_grad()
@pytest.mark.skipif(extension is None or extension.float32_isa() != "AVX-512", reason="needs AVX-512")
@pytest.mark.parametrize("name", STEMS)
def test_a_stem_has_the_same_bits_in_each_instruction_set(name):
    sizes, pool, side = STEMS[name]
    torch.manual_seed(0)
    network, x = stem_alone(nn.Conv2d(*sizes), pool), torch.randn(3, sizes[0], *side)
    with float32_limited_to("AVX2"):
        [limited] = network([0], [x])
    assert torch.equal(limited, network([0], [x])[0])


@pytest.mark.skipif(extension is None or not extension.has_direct_bf16(), reason="needs AVX-512 BF16")
def test_a_bfloat16_pooling_takes_the_values_themselves():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 32, 3, 2, 1).bfloat16(), torch.randn(3, 3, 21, 18).bfloat16()
    with torch.no_grad():
        [got] = stem_alone(conv, (3, 2, 1))([0], [x])
        torch.testing.assert_close(got, means(conv, (3, 2, 1), x), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("pool", [(-1, 1, 0), (3, 0, 1), (3, 2, -1), (3, 2, 2), (0, 1, 1)])
def test_poolings_that_are_none_are_refused(pool):
    with pytest.raises(ValueError, match="dense_conv: a pooling's"):
        extension.DenseConv((3, 16, 3, 3, 1, 1), torch.randn(48 * 16), torch.zeros(16), pool=pool)


def test_images_without_a_window_of_the_pooling_are_refused():
    network = stem_alone(nn.Conv2d(3, 16, 3), (3, 2, 0))
    with pytest.raises(ValueError, match="images must be at least as large"):
        network([0], [torch.randn(2, 3, 4, 4)])
