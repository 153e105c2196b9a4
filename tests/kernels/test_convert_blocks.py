"""What `convert` finds and leaves alone, what it takes care of, and what it says."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from den_kernels import DynamicBatchNorm2d, DynamicConv2d, convert, levels
from tests.foreign_models import FAMILIES, foreign, images
from tests.oracle import unlike_new
from tests.stand_ins import InvertedResidual, Network, PlainBasicBlock, PlainBottleneck

X = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """x + branch(x)"""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def conv(C_in: int, C_out: int, kernel: int = 3, **settings: object) -> nn.Conv2d:
    return nn.Conv2d(C_in, C_out, kernel, padding=kernel // 2, **settings)


def basic() -> list[nn.Module]:
    return [conv(8, 12), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 8), nn.BatchNorm2d(8)]


def at(model: nn.Module, x: Tensor, *own: int) -> Tensor:
    """The output with these levels for every instance."""
    with torch.no_grad(), levels(model, torch.tensor(own).expand(len(x), len(own))):
        return model(x)


BRANCHES = {
    "norm last": basic,
    "bias last": lambda: [conv(8, 12), nn.ReLU(), conv(12, 8)],
    "linear": lambda: [nn.LayerNorm(6), nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)],
    "gate behind": lambda: [*basic(), Gate(8)],
    "gate inside": lambda: [conv(8, 12), nn.BatchNorm2d(12), nn.ReLU(), Gate(12), conv(12, 8), nn.BatchNorm2d(8)],
    "depthwise behind": lambda: [*basic(), conv(8, 8, groups=8, bias=False), nn.BatchNorm2d(8)],
}  # fmt: skip


class Gate(nn.Module):
    """Squeeze and excitation (Hu et al., CVPR 2018), with linear layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(channels, 4), nn.Linear(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(pooled))))
        return x * gate.view(x.size(0), -1, 1, 1)


@pytest.mark.parametrize("what", BRANCHES)
def test_level_0_is_the_shortcut_alone(what):
    """A bias, and a norm that makes a constant of 0, would remain of the branch."""
    model = unlike_new(Residual(*BRANCHES[what]())).eval()
    assert len(convert(model, 2, example=X)) == 1
    assert torch.equal(at(model, X, 0), X)
    assert not torch.allclose(at(model, X, 1), X)
    assert not torch.allclose(at(model, X, 1), at(model, X, 2))


def test_a_projection_of_a_pre_activation_block_reads_the_first_norm():
    name = "pytorchcv_preresnet"
    model, block = foreign(name), "features.stage2.unit1"
    unit = copy.deepcopy(model.get_submodule(block))
    convert(model, 2, blocks=[block], example=images(name))
    x = torch.randn(2, 16, 16, 16)
    with torch.no_grad(), levels(model, torch.zeros(2, 1, dtype=torch.int32)):
        got = model.get_submodule(block)(x)
        assert torch.equal(got, unit.identity_conv(unit.body.conv1.activ(unit.body.conv1.bn(x.clone()))))


def test_norms_that_train_count_the_instances_that_use_a_channel():
    model = unlike_new(Residual(*basic())).train()
    plain = copy.deepcopy(model.branch)
    convert(model, (1, 1, 2), example=X)
    assert model.training
    own = torch.tensor([3, 0, 1, 2])
    with levels(model, own[:, None]):
        model(X)
    hidden, last = model.branch[1], model.branch[4]
    with torch.no_grad():
        y = plain[0](X)
        for c, group in enumerate([0] * 3 + [1] * 3 + [2] * 6):
            used = y[own > group, c]
            wanted = 0.9 * plain[1].running_mean[c] + 0.1 * used.mean()
            torch.testing.assert_close(hidden.running_mean[c], wanted, rtol=1e-5, atol=1e-5)
            wanted = 0.9 * plain[1].running_var[c] + 0.1 * used.var()
            torch.testing.assert_close(hidden.running_var[c], wanted, rtol=1e-5, atol=1e-5)
            used.copy_((used - used.mean()) / (used.var(correction=0) + 1e-5).sqrt() * plain[1].weight[c])
            y[own > group, c] = (used + plain[1].bias[c]).relu()
            y[own <= group, c] = 0
        branch = plain[3](y)[own > 0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(last.running_mean, 0.9 * plain[4].running_mean + 0.1 * branch.mean(1))
    torch.testing.assert_close(last.running_var, 0.9 * plain[4].running_var + 0.1 * branch.var(1))


def test_both_layers_of_squeeze_and_excitation_are_elastic():
    name = "pytorchcv_efficientnet"
    model = foreign(name)
    block = next(iter(convert(model, 2, example=images(name))))
    gate = model.get_submodule(f"{block.name}.se")
    assert gate.conv1.in_groups == gate.conv2.out_groups == block.groups[0]
    assert gate.conv1.out_groups == gate.conv2.in_groups == ()


def test_blocks_without_a_shortcut_have_no_level_0():
    model = Network(InvertedResidual).eval()
    report = convert(model, 2, example=torch.randn(1, 3, 8, 8))
    assert report.lowest == (0, 1, 0)
    assert report.blocks[1].kind == "inverted residual without a shortcut"
    assert type(model.layers[1].conv[3]) is nn.BatchNorm2d  # nothing to close


def test_channel_groups_lie_on_the_boundaries_of_cardinality():
    model = Network(partial(PlainBottleneck, width=18, groups=6)).eval()
    report = convert(model, 4, example=torch.randn(1, 3, 8, 8))
    assert [block.groups for block in report] == [((6, 3, 3, 6), (6, 3, 3, 6))] * 3
    assert report.blocks[0].kind == "post-activation grouped bottleneck"
    wide = Network(partial(PlainBottleneck, width=18, groups=2))
    with pytest.raises(ValueError, match=r"layers\.0: 2 units of hidden channels cannot be divided into groups"):
        convert(wide, 4, example=torch.randn(1, 3, 8, 8))


def test_a_last_norm_of_weight_0_and_activations_in_norms():
    """As timm builds them: the branch of a new model is 0, so that its own parameters would prove anything."""
    model = FAMILIES["timm"].build().eval()
    assert not model.layers[0].conv3.bn.weight.any()
    assert len(convert(model, 2, example=images("timm"))) == 3
    assert isinstance(model.layers[0].conv1.bn, DynamicBatchNorm2d)
    assert isinstance(model.layers[0].conv1.bn.act, nn.ReLU)


UNITS = [f"features.stage{stage}.unit{unit}" for stage in (1, 2) for unit in (1, 2)]
NAMES = {
    "pytorchcv_resnet": UNITS,
    "torchvision_mobilenetv2": ["layers.0", "layers.1", "layers.2"],
    "torchvision_convnext": ["layers.0", "layers.1"],
    "transformers": ["layers.0", "layers.1", "layers.2"],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_block_is_the_module_that_adds(name):
    """Not the body that it holds, which looks like a block without a shortcut."""
    assert [block.name for block in convert(foreign(name), 2, example=images(name))] == NAMES[name]


def test_layers_of_the_model_itself_are_blocks_too():
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third, self.fourth = (conv(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.second(F.relu(self.first(x)))
            return torch.add(self.fourth(F.relu(self.third(x))), x)

    model = Inline().eval()
    report = convert(model, 2, example=X)
    assert [block.layers for block in report] == [("first", "second"), ("third", "fourth")]
    assert torch.equal(at(model, X, 0, 0), X)


@pytest.mark.parametrize("name", FAMILIES)
def test_sorted_by_importance_it_is_the_same_function(name):
    model = foreign(name).double()
    x = images(name).double()
    original, keys = model(x), list(model.state_dict())
    before = copy.deepcopy(model.state_dict())
    convert(model, 2, order="l1", example=x[:1])
    assert list(model.state_dict()) == keys
    same = all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert same == (name == "torchvision_mobilenetv2_narrow")  # a depthwise convolution first: nothing can be sorted
    torch.testing.assert_close(model(x), original, rtol=1e-9, atol=1e-9)


def test_sorted_the_important_channels_come_first():
    model = unlike_new(Residual(*basic())).eval()
    importance = model.branch[3].weight.abs().sum((0, 2, 3)) * model.branch[1].weight.abs()
    convert(model, 3, order="l1", example=X)
    got = model.branch[3].weight.abs().sum((0, 2, 3)) * model.branch[1].weight.abs()
    torch.testing.assert_close(got, importance.sort(descending=True).values)


def test_blocks_are_chosen_by_name_and_by_predicate():
    x = torch.randn(1, 3, 8, 8)
    model = Network(PlainBasicBlock)
    report = convert(model, 2, blocks=["layers.2", "layers.0"], example=x)
    assert [block.name for block in report] == ["layers.0", "layers.2"]
    assert [(each.name, each.reason) for each in report.left] == [("layers.1", "not asked for")]
    assert type(model.layers[1].conv1) is nn.Conv2d
    model = Network(PlainBasicBlock)
    report = convert(model, 2, blocks=lambda name, block: block.downsample is not None, example=x)
    assert [block.name for block in report] == ["layers.1"]


def test_the_report_shows_blocks_and_reasons():
    model = Network(PlainBasicBlock)
    model.layers[1].conv1.register_forward_hook(lambda *_: None)
    shown = str(convert(model, 2, example=torch.randn(1, 3, 8, 8)))
    assert "0  layers.0  post-activation basic block  8+8             dynamic_residual" in shown
    assert "left alone: layers.1: Conv2d layers.1.conv1 has hooks (forward_hooks), which would be lost" in shown


def shared_block() -> nn.Module:
    block = Residual(*basic())
    return nn.Sequential(block, block)


def shared_layer() -> nn.Module:
    first, last = conv(8, 8), conv(8, 8)
    return nn.Sequential(Residual(first, nn.ReLU(), last), Residual(first, nn.ReLU(), conv(8, 8)))


def two_names() -> nn.Module:
    model = Residual(conv(8, 8), nn.ReLU(), conv(8, 8))
    model.again = model.branch[0]
    return model


def shared_parameter() -> nn.Module:
    model = Residual(conv(8, 8), nn.ReLU(), conv(8, 8))
    model.branch[2].weight = model.branch[0].weight
    return model


def with_hook() -> nn.Module:
    model = Residual(*basic())
    model.branch[1].register_forward_pre_hook(lambda *_: None)
    return model


def quantised() -> nn.Module:
    model = nn.Sequential(Residual(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)))
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Dense(nn.Module):
    """The hidden map is an output, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x))
        return torch.cat([x + self.second(hidden), hidden], 1)


class Scaled(nn.Module):
    """A weight for each hidden channel that no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.scale = conv(8, 8), conv(8, 8), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)) * self.scale.view(1, -1, 1, 1))


LEFT = {
    "shared block": (shared_block, "shared: it runs 2 times"),
    "shared layer": (shared_layer, "shared: it runs 2 times and stands in 2 places"),
    "one layer, two names": (two_names, "shared: it runs 1 times and stands in 2 places"),
    "shared parameter": (shared_parameter, "shares a parameter with another module"),
    "parametrised": (lambda: Residual(weight_norm(conv(8, 8)), nn.ReLU(), conv(8, 8)), "Parametrized"),
    "quantised": (quantised, "no two convolutions or linear layers follow each other"),
    "hooks": (with_hook, r"BatchNorm2d branch.1 has hooks \(forward_pre_hooks\)"),
    "another forward": (lambda: Residual(Doubled(8, 8, 3, padding=1), nn.ReLU(), conv(8, 8)), "no two convolutions"),
    "layer norm": (lambda: Residual(conv(8, 8), nn.LayerNorm(6), conv(8, 8)), "LayerNorm branch.1 does not treat each"),
    "softmax": (lambda: Residual(conv(8, 8), nn.Softmax(1), conv(8, 8)), "Softmax branch.1 does not treat each"),
    "sigmoid": (lambda: Residual(conv(8, 8), nn.Sigmoid(), conv(8, 8)), "reads hidden channels that are not 0"),
    "constant": (lambda: Residual(conv(8, 8), nn.ReLU(), conv(8, 8), nn.Sigmoid()), "level 0 gives more than"),
    "hidden map is read": (Dense, r"hidden channels are also read by cat\(\) in model"),
    "hidden scale": (Scaled, r"mul\(\) in model has a weight for each hidden channel"),
    "no branch": (lambda: nn.Sequential(conv(8, 8), nn.ReLU(), conv(8, 8)), "0 sums; 2 Conv2d, 1 ReLU"),
    "one layer": (lambda: Residual(conv(8, 8), nn.ReLU()), "no two convolutions or linear layers follow each other"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", LEFT)
def test_what_cannot_be_proved_is_left_alone_and_said(what):
    make, reason = LEFT[what]
    model = make().eval()
    kinds, y = [type(m) for m in model.modules()], model(X)
    with pytest.raises(ValueError, match=rf"convert: model must have a sum of a shortcut(.|\n)*{reason}"):
        convert(model, 2, example=X)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(X), y)


BAD = {
    "no groups": ({"groups": 0}, "groups must be a number of groups or their shares, all positive, got 0"),
    "no share": ({"groups": (1, 0)}, r"all positive, got \(1, 0\)"),
    "order": ({"order": "l2"}, "order must be 'none' or 'l1', got 'l2'"),
    "name": ({"blocks": ["stage"]}, "blocks must be among layers.0, layers.1, layers.2, got stage"),
    "too many groups": ({"groups": 33}, "cannot be divided into groups"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what):
    settings, message = BAD[what]
    with pytest.raises(ValueError, match=f"convert: (.|\n)*{message}"):
        convert(Network(PlainBasicBlock), example=torch.randn(1, 3, 8, 8), **settings)


def test_random_numbers_of_the_caller_stay_what_they_are():
    model, x = Network(PlainBasicBlock), torch.randn(1, 3, 8, 8)
    state = torch.get_rng_state()
    convert(model, 2, example=x)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_is_converted_once():
    model = Network(PlainBasicBlock)
    convert(model, 2, example=torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match="convert: model must not be converted already, got Network"):
        convert(model, 2, example=torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    "example", [(torch.randn(1, 3, 8, 8),), {"x": torch.randn(1, 3, 8, 8)}], ids=["tuple", "mapping"]
)
def test_examples_are_what_the_model_takes(example):
    assert len(convert(Network(PlainBasicBlock), 2, example=example)) == 3


def test_without_an_example_it_is_an_image_of_the_size_that_the_model_says():
    model = Network(PlainBasicBlock)
    model.in_size, sizes = (10, 12), []
    hook = model.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape))
    convert(model, 2)
    hook.remove()
    assert sizes == [(1, 3, 10, 12)]


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm], ids=["batch norm", "sync"])
def test_a_dynamic_norm_shares_what_a_norm_has(kind):
    norm = kind(8, eps=1e-3, momentum=None).eval()
    made = DynamicBatchNorm2d.from_norm(norm, groups=2)
    assert made.groups == (4, 4)
    assert (made.eps, made.momentum, made.training) == (1e-3, None, False)
    assert made.process_group == ("world" if kind is nn.SyncBatchNorm else None)
    assert all(made.state_dict()[key].data_ptr() == value.data_ptr() for key, value in norm.state_dict().items())
    assert made.weight is norm.weight
    x = torch.randn(2, 8, 3, 3)
    assert torch.equal(made(x), F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-3))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(8), nn.GroupNorm(2, 8), nn.LazyBatchNorm2d()], ids=type)
def test_a_dynamic_norm_is_made_of_a_norm_of_maps(norm):
    with pytest.raises(TypeError, match=r"from_norm: norm must be an (initialized )?nn\.BatchNorm2d, got"):
        DynamicBatchNorm2d.from_norm(norm)


def test_norms_that_share_their_statistics_do_so_behind():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(unlike_new(Residual(*basic()))).eval()
    plain = copy.deepcopy(model)
    convert(model, 2, example=X)
    assert [norm.process_group for norm in (model.branch[1], model.branch[4])] == ["world", "world"]
    assert torch.equal(at(model, X, 2), plain(X))
    assert torch.equal(at(model, X, 0), X)


def test_layers_stay_what_they_were_to_others():
    model = Network(PlainBasicBlock)
    convert(model, 2, example=torch.randn(1, 3, 8, 8))
    assert isinstance(model.layers[0].conv1, DynamicConv2d)
    assert isinstance(model.layers[0].conv1, nn.Conv2d)
    assert isinstance(model.layers[0].bn1, nn.BatchNorm2d)
