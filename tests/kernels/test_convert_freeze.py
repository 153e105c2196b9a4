"""Frozen models: the same results, fewer modules, weights of their own, and no change of what they are of."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from den_kernels import ElasticModel, WithLevels, convert, extract, freeze, level_flops, levels, recalibrate
from den_kernels._extension import extension
from den_kernels.convert.frozen import FrozenBlock, FrozenRow
from den_kernels.convert.frozen_conv import FrozenConv2d
from den_kernels.convert.layers import RoutedBatchNorm2d
from den_kernels.convert.pair import FrozenPair
from tests.foreign_models import FAMILIES, foreign, images, random_levels
from tests.oracle import unlike_new
from tests.stand_ins import PlainBasicBlock, PlainBottleneck

FUSED = ("resnet", "wrn", "resnext", "regnetx", "torchvision_basic", "torchvision_bottleneck", "timm", "transformers",
         "mobilenetv2", "efficientnet")  # fmt: skip
SHARES = (1, 1, 2)


@torch.no_grad()
def assert_alike(frozen: nn.Module, model: nn.Module, x: torch.Tensor, own: torch.Tensor | None) -> None:
    results = []
    for each in (frozen, model):
        if own is None:
            results.append(each(x.clone()))
        else:
            with levels(each, own):
                results.append(each(x.clone()))
    size = float(results[1].abs().max())
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4 * size)


@pytest.mark.parametrize("recalibrated", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_frozen_model_computes_what_the_model_does(name, recalibrated):
    model, x = foreign(name), images(name)
    report = convert(model, SHARES, example=x[:1])
    if recalibrated:
        if not any(isinstance(m, RoutedBatchNorm2d) for m in model.modules()):
            pytest.skip("no batch norm")
        recalibrate(model, [x], progress=False)
    state = copy.deepcopy(model.state_dict())
    frozen = freeze(model, x[:1])
    own = random_levels(len(x), report.lowest, 3)
    masks = torch.rand(*own.shape, 3) < 0.5
    masks |= (torch.arange(3) == 0) & ~masks.any(2, keepdim=True) & (torch.tensor(report.lowest) > 0)[:, None]
    for given in (None, own, own[:, :1].maximum(torch.tensor(report.lowest)), masks):
        if not (recalibrated and given is masks):
            assert_alike(frozen, model, x, given)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    if not recalibrated:
        assert not any(isinstance(m, RoutedBatchNorm2d) for m in frozen.modules())
    if any(word in name for word in FUSED) and "se" not in name:
        fused = sum(isinstance(m, FrozenBlock) for m in frozen.modules())
        narrow = sum("inverted" in block.kind and len(block.groups) == 1 for block in report)  # whose hidden map is x
        assert fused == len(report) - (narrow if recalibrated else 0)


class Mlp(nn.Module):
    """x + a pair of layers with an activation between them, but for one thing."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, convolutions = what, what == "1 x 1 convolutions"
        self.first = nn.Conv2d(8, 24, 1) if convolutions else nn.Linear(8, 24)
        self.act = nn.GELU("tanh" if what == "another GELU" else "none")
        self.drop = nn.Dropout(0.5)
        self.last = nn.Conv2d(24, 8, 1) if convolutions else nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.what == "1 x 1 convolutions":
            return x + self.last(self.drop(self.act(self.first(x))))
        x = x.permute(0, 2, 3, 1)
        if self.what == "tokens":
            x = x.flatten(1, 2)
        h = self.first(x)
        h = F.silu(h) if self.what == "a function" else self.act(h)
        if self.what == "two activations":
            h = self.act(h)
        x = x + self.last(self.drop(h))
        return x.mean(1) if self.what == "tokens" else x


PAIRS = ("linear layers", "tokens", "1 x 1 convolutions")


@pytest.mark.parametrize("what", [*PAIRS, "another GELU", "a function", "two activations", "a hook"])
def test_two_layers_and_the_activation_between_them_are_one_op(what):
    model, x = unlike_new(nn.Sequential(nn.Conv2d(3, 8, 1), Mlp(what))).eval(), torch.randn(4, 3, 5, 6)
    convert(model, SHARES, example=x[:1])
    if what == "a hook":
        model[1].act.register_forward_hook(lambda module, args, y: None)
    frozen = freeze(model, x[:1])
    runs = what in PAIRS and extension is not None and extension.has_direct_float32()
    assert sum(isinstance(m, FrozenPair) for m in frozen.modules()) == int(runs)
    masks = torch.tensor([[[0, 0, 1]], [[1, 0, 1]], [[1, 1, 1]], [[0, 0, 0]]]).bool()
    for given in (None, torch.arange(4)[:, None], masks):
        assert_alike(frozen, model, x, given)


def plain_convolutions() -> nn.Sequential:
    """Convolutions in front of, between and behind two blocks: 3 x 3, strided, 1 x 1, large, with cardinality."""
    layers = [
        nn.Conv2d(3, 16, 7, 2, 3), nn.ReLU(), PlainBasicBlock(16, 16), nn.Conv2d(16, 24, 3, 2, 1, bias=False),
        nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=2), PlainBasicBlock(24, 24),
        nn.Conv2d(24, 40, 1, padding=1), nn.Conv2d(40, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, 2, dilation=2),
    ]  # fmt: skip
    return unlike_new(nn.Sequential(*layers)).eval()


def test_convolutions_that_no_level_reaches_keep_packed_weights():
    model, x = plain_convolutions(), torch.randn(3, 3, 33, 30)
    convert(model, SHARES, example=x[:1])
    model[8].register_forward_hook(lambda module, args, y: None)
    frozen = freeze(model, x[:1])
    runs = extension is not None and extension.has_direct_float32()
    packed = [n for n, m in enumerate(frozen) if isinstance(m, FrozenConv2d)]
    assert packed == ([3, 10] if runs else [])  # not: many taps, cardinality, a hook, another padding
    own = torch.tensor([[0, 1], [3, 2], [1, 0]])
    assert_alike(frozen, model, x, own)
    for given in (x[:1], x.contiguous(memory_format=torch.channels_last)):
        assert_alike(frozen, model, given, own[: len(given)])
    with levels(frozen, own[:0]):
        assert frozen(x[:0]).shape[0] == 0
    conv = frozen[3]
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.randn(1, 16, 9, 9)).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="to have 16 channels"):  # torch's words
        conv(torch.randn(1, 8, 9, 9))
    wanted = F.conv2d(y := torch.randn(2, 16, 9, 9), conv.weight, conv.bias, 2, 1)
    torch.testing.assert_close(torch.func.vmap(conv)(y[:, None])[:, 0], wanted)
    y.requires_grad_()
    conv(y).sum().backward()
    assert y.grad is not None


def row_of(block: type[nn.Module], count: int = 3) -> nn.Sequential:
    width = 16 if block is PlainBasicBlock else 64
    blocks = (
        [block(width, width) for _ in range(count)]
        if block is PlainBasicBlock
        else [block(64, 64) for _ in range(count)]
    )
    return unlike_new(
        nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), *blocks, nn.Conv2d(width, 4, 1))
    ).eval()


def test_what_reads_a_map_behind_its_block_is_not_written_over():
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.row = row_of(PlainBasicBlock)

        def forward(self, x):
            kept, found = [], x
            for layer in self.row:
                found = layer(found)
                kept.append(found)
            return kept[-1], kept

    model, x = Kept().eval(), torch.randn(4, 3, 8, 8)
    report = convert(model, 2, example=x[:1])
    frozen, own = freeze(model, x[:1]), random_levels(4, report.lowest, 2)
    with torch.no_grad(), levels(model, own):
        wanted = model(x)[1]
    with torch.no_grad(), levels(frozen, own):
        for got, exact in zip(frozen(x)[1], wanted, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)


def test_the_input_is_not_written_over():
    model, x = (
        unlike_new(nn.Sequential(PlainBasicBlock(16, 16), PlainBasicBlock(16, 16))).eval(),
        torch.rand(3, 16, 6, 6),
    )
    convert(model, 2, example=x[:1])
    before = x.clone()
    frozen = freeze(model, x[:1])
    with torch.no_grad(), levels(frozen, torch.tensor([[1, 2], [0, 1], [2, 2]])):
        frozen(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("hooked", [False, True])
def test_blocks_in_a_row_are_one_call_unless_they_are_watched(hooked):
    model, x = row_of(PlainBasicBlock), torch.randn(4, 3, 8, 8)
    report = convert(model, 2, example=x[:1])
    frozen, own = freeze(model, x[:1]), random_levels(4, report.lowest, 2)
    rows = [m for m in frozen.modules() if isinstance(m, FrozenRow)]
    direct = all(m.direct for m in frozen.modules() if isinstance(m, FrozenBlock))
    assert len(rows) == int(direct)
    seen = []
    if hooked:
        for block in frozen.modules():
            if isinstance(block, FrozenBlock):
                block.register_forward_hook(lambda *_: seen.append(1))
    assert_alike(frozen, model, x, own)
    assert len(seen) == (3 if hooked else 0)


def test_a_shortcut_and_a_head_of_its_own_and_an_elastic_model():
    model, x = foreign("pytorchcv_preresnet"), images("pytorchcv_preresnet")
    report = convert(model, 2, example=x[:1])

    class Selector(nn.Module):
        def forward(self, x):
            return (x.flatten(1).sum(1, keepdim=True) > 0).long().expand(-1, len(report)) + 1

    elastic = ElasticModel(model, Selector())
    frozen = freeze(elastic, x[:1])
    assert isinstance(frozen, ElasticModel)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), elastic(x), rtol=1e-4, atol=1e-3)


def test_a_frozen_model_exports_with_its_weights_as_constants():
    model, x = row_of(PlainBottleneck, 2), torch.randn(2, 3, 8, 8)
    report = convert(model, 2, example=x[:1])
    frozen = WithLevels(freeze(model, x[:1]))
    own = random_levels(2, report.lowest, 2)
    with torch.no_grad():
        program = torch.export.export(frozen, (x, own), strict=False)
        names = {str(node.target) for node in program.graph.nodes}
        assert any("dynamic_bottleneck" in name for name in names)
        for given in (own, own.flip(0)):
            torch.testing.assert_close(program.module()(x, given), frozen(x, given), rtol=1e-4, atol=1e-4)


def test_masks_are_refused_where_there_are_statistics_for_each_level():
    model, x = foreign("torchvision_basic"), images("torchvision_basic")
    report = convert(model, 2, example=x[:1])
    recalibrate(model, [x], progress=False)
    with (
        torch.no_grad(),
        levels(frozen := freeze(model, x[:1]), torch.ones(len(x), len(report), 2, dtype=torch.bool)),
        pytest.raises(ValueError, match="must be integers, got masks"),
    ):
        frozen(x)


def test_models_that_were_not_converted_are_refused():
    with pytest.raises(ValueError, match=r"freeze: model must be one that den_kernels\.convert has changed, got none"):
        freeze(nn.Conv2d(3, 3, 1))


@pytest.mark.parametrize(
    "name", ["pytorchcv_resnet", "pytorchcv_efficientnet", "torchvision_convnext", "torchvision_resnext"]
)
def test_flops_are_those_of_the_plain_model_of_each_structure(name):
    model, x = foreign(name), images(name)
    report = convert(model, 2, example=x[:1])
    found = level_flops(model, x)
    for level in (1, 2):
        counted = 0

        def count(module, args, y):
            nonlocal counted
            weight = module.weight
            pixels = y[0, 0].numel() if isinstance(module, nn.Conv2d) else y[0].numel() // y.shape[-1]
            counted += 2 * pixels * weight.numel()

        plain = extract(model, [level] * len(report))
        for module in plain.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(count)
        with torch.no_grad():
            plain(x[:1])
        assert int(found.of(torch.full((1, len(report)), level))[0]) == counted
    assert found.full == int(found.of(torch.full((len(report),), 2)))
    assert F.relu(-found.blocks).sum() == 0
