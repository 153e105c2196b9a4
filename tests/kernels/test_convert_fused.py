"""Converted blocks that run as one op at inference: which, that the op is right, and when the layers run instead."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den_kernels import convert, levels, recalibrate
from den_kernels.convert.fused import BASIC, BOTTLENECK, Branch
from den_kernels.convert.inverted import INVERTED, InvertedBranch
from tests.foreign_models import FAMILIES, foreign, images, random_levels
from tests.oracle import unlike_new
from tests.stand_ins import PlainBasicBlock

LAYERS = "dynamic convolutions"
FORMS = {
    **dict.fromkeys(("pytorchcv_resnet", "pytorchcv_preresnet", "pytorchcv_wrn", "torchvision_basic"), BASIC),
    **dict.fromkeys(
        ("pytorchcv_resnet_bottleneck", "pytorchcv_preresnet_bottleneck", "pytorchcv_resnext", "pytorchcv_regnetx",
         "torchvision_bottleneck", "torchvision_resnext", "timm", "transformers"), BOTTLENECK,
    ),
    **dict.fromkeys(
        ("pytorchcv_mobilenetv2", "pytorchcv_efficientnet", "torchvision_mobilenetv2",
         "torchvision_mobilenetv2_narrow"), INVERTED,
    ),
}  # fmt: skip


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Branch | InvertedBranch]:
    """The branches that an op ran for, in order."""
    seen: list[Branch | InvertedBranch] = []

    def count(kind: type[Branch | InvertedBranch]) -> None:
        call = kind.__call__

        def counted(branch: Branch | InvertedBranch, *arguments: object) -> Tensor:
            seen.append(branch)
            return call(branch, *arguments)

        monkeypatch.setattr(kind, "__call__", counted)

    count(Branch)
    count(InvertedBranch)
    return seen


def at(model: nn.Module, x: Tensor, own: Tensor) -> Tensor:
    with torch.no_grad(), levels(model, own):
        return model(x)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_of_a_known_form_run_as_one_op(name, runs):
    """That they compute the same is tested with all models."""
    model, x = foreign(name), images(name)
    report = convert(model, 2, example=x)
    wanted = FORMS.get(name, LAYERS)
    assert {block.kernel for block in report} == {wanted}
    runs.clear()
    at(model, x, random_levels(len(x), report.lowest, 2))
    assert len(runs) == (len(report) if wanted != LAYERS else 0)


def test_a_full_block_beside_others_is_an_op_and_all_full_blocks_are_the_originals_layers(elastic, runs):
    for own, ops in (((2, 1, 2), 3), ((2, 0, 2), 3), ((2, 2, 2), 0)):
        runs.clear()
        y = at(elastic, X[:1], torch.tensor([own]))
        assert len(runs) == ops
    assert torch.equal(y, elastic(X[:1]))


@pytest.fixture
def elastic() -> nn.Module:
    model = foreign("torchvision_basic")
    convert(model, 2, example=images("torchvision_basic"))
    return model


X, OWN = images("torchvision_basic"), random_levels(6, (0, 0, 0), 2)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def with_gradients(model: nn.Module) -> Tensor:
    with levels(model, OWN):
        return model(X).detach()


def with_autocast(model: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return at(model, X, OWN).float()


def with_a_hook(model: nn.Module) -> Tensor:
    for block in model.layers:
        block.relu.register_forward_hook(lambda module, args, y: y)
    return at(model, X, OWN)


def with_everything_on(model: nn.Module) -> Tensor:
    at(model, X, torch.full((6, 3), 2))
    return with_gradients(model)


CALLS = {f.__name__: f for f in (with_gradients, with_autocast, with_a_hook, with_everything_on)}


@pytest.mark.parametrize("call", CALLS)
def test_the_layers_run_where_the_op_may_not(call, elastic, runs):
    wanted = at(elastic, X, OWN)
    assert len(runs) == 3
    runs.clear()
    got = CALLS[call](elastic)
    assert runs == []
    close = {"rtol": 0.1, "atol": 0.2} if call == "with_autocast" else CLOSE
    torch.testing.assert_close(got, wanted, **close)


def test_the_layers_run_while_norms_train_and_where_levels_have_statistics(elastic, runs):
    at(elastic.train(), X, OWN)
    recalibrate(elastic.eval(), [X], progress=False)
    at(elastic, X, OWN)
    assert runs == []


def test_changed_parameters_and_statistics_are_noticed(elastic, runs):
    at(elastic, X, OWN)
    with torch.no_grad():
        for block in elastic.layers:
            block.conv1.weight.mul_(2)
            block.bn2.running_mean.add_(1)
    runs.clear()
    got = at(elastic, X, OWN)
    assert len(runs) == 3
    torch.testing.assert_close(got, with_gradients(elastic), **CLOSE)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_runs_its_own_parameters(way, elastic, runs):
    other = way(elastic)
    with torch.no_grad():
        for parameter in elastic.parameters():
            parameter.zero_()
    got = at(other, X, OWN)
    assert len(runs) == 3
    torch.testing.assert_close(got, with_gradients(other), **CLOSE)
    assert not torch.allclose(got, at(elastic, X, OWN))


def test_masks_and_other_dtypes(elastic, runs):
    mask = OWN[:, :, None] > torch.arange(2).flip(0)
    torch.testing.assert_close(at(elastic, X, mask), at(elastic.double(), X.double(), mask).float(), **CLOSE)
    assert len(runs) == 6


def test_an_input_that_is_no_relu_is_not_taken_for_one():
    """Level 0 of a post-activation block gives relu(x), whatever x is."""
    model = unlike_new(PlainBasicBlock(16, 16)).eval()
    model = nn.Sequential(nn.Identity(), model)
    report = convert(model, 2, example=torch.randn(1, 16, 6, 6))
    assert [block.kernel for block in report] == [BASIC]
    x = torch.randn(3, 16, 6, 6)
    assert torch.equal(at(model, x, torch.zeros(3, 1, dtype=torch.int64)), x.relu())


class Alike(nn.Module):
    """A basic block but for one thing."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y = F.silu(y) if self.what == "another activation" else F.relu(y)
        y = self.bn2(self.conv2(y))
        if self.what == "scaled branch":
            y = 0.5 * y
        if self.what == "scaled shortcut":
            return F.relu(2 * x + y)
        if self.what == "no activation":
            return x + y
        y = F.relu(x + y)
        return y + 0.5 if self.what == "something behind" else y


@pytest.mark.parametrize(
    "what",
    ["another activation", "scaled branch", "scaled shortcut", "no activation", "something behind", "nothing"],
)
def test_blocks_that_look_alike_are_not_taken_for_one(what):
    model = unlike_new(nn.Sequential(nn.ReLU(), Alike(what))).eval()
    report = convert(model, 2, example=torch.randn(1, 16, 6, 6))
    assert [block.kernel for block in report] == [BASIC if what == "nothing" else LAYERS]
    x, own = torch.randn(3, 16, 6, 6), torch.tensor([[0], [1], [2]])
    with levels(model, own):
        torch.testing.assert_close(at(model, x, own), model(x), **CLOSE)
