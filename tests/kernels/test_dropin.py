"""Somebody else's network: the CIFAR ResNet-20 of pytorchcv, with its convolutions replaced."""

import copy

import pytest
import torch
from pytorchcv.models import resnet_cifar
from torch import nn

from den_kernels.layers import DynamicConv2d


def replace_convolutions(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Conv2d:
                setattr(module, name, DynamicConv2d.from_conv(child))
    return model


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return resnet_cifar.resnet20_cifar10(pretrained=False).eval()


@pytest.mark.parametrize("training", [False, True])
def test_every_convolution_replaced_changes_no_bit(network, training):
    replaced = replace_convolutions(copy.deepcopy(network)).train(training)
    network.train(training)
    kinds = [type(m) for m in replaced.modules() if isinstance(m, nn.Conv2d)]
    assert len(kinds) == 21
    assert set(kinds) == {DynamicConv2d}
    x = torch.randn(2, 3, 32, 32)
    outputs = [model(x) for model in (network, replaced)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for (name, a), (other, b) in zip(network.named_parameters(), replaced.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a.grad, b.grad)
    before, after = network.state_dict(), replaced.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


class ElasticBody(nn.Module):
    """The two convolutions of a residual unit with elastic hidden channels."""

    def __init__(self, body: nn.Module, groups: tuple[int, ...]) -> None:
        super().__init__()
        self.body = body
        self.first = DynamicConv2d.from_conv(body.conv1.conv, out_groups=groups)
        self.second = DynamicConv2d.from_conv(body.conv2.conv, in_groups=groups)

    def forward(self, x, levels):
        hidden = self.body.conv1.activ(self.body.conv1.bn(self.first(x, levels)))
        return self.body.conv2.bn(self.second(hidden, levels))


def sliced_by_hand(body: nn.Module, x, levels, groups: tuple[int, ...]):
    """The same, one instance after the other, with convolutions and batch norm cut to the width."""
    conv1, bn1, conv2, bn2 = body.conv1.conv, body.conv1.bn, body.conv2.conv, body.conv2.bn
    outputs = []
    for image, level in zip(x, levels.tolist(), strict=True):
        width = sum(groups[:level])
        y = torch.zeros_like(image)[None]
        if width:
            hidden = nn.functional.conv2d(image[None], conv1.weight[:width], padding=1)
            hidden = nn.functional.batch_norm(
                hidden, bn1.running_mean[:width], bn1.running_var[:width], bn1.weight[:width], bn1.bias[:width],
                eps=bn1.eps,
            ).relu()  # fmt: skip
            y = nn.functional.conv2d(hidden, conv2.weight[:, :width], padding=1)
        outputs.append(bn2(y))
    return torch.cat(outputs)


def test_one_elastic_pair_equals_slicing_by_hand(network):
    body, groups = network.features.stage1.unit2.body, (4, 4, 8)
    with torch.no_grad():
        for bn in (body.conv1.bn, body.conv2.bn):
            bn.running_mean.normal_()
            bn.bias.normal_()
    x, levels = torch.randn(6, 16, 32, 32), torch.tensor([3, 0, 1, 2, 1, 3])
    results = []
    for function in (ElasticBody(body, groups), lambda x, levels: sliced_by_hand(body, x, levels, groups)):
        leaf = x.clone().requires_grad_()
        y = function(leaf, levels)
        parameters = [body.conv1.conv.weight, body.conv2.conv.weight, body.conv1.bn.weight]
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *parameters])])
    for elastic, by_hand in zip(*results, strict=True):
        torch.testing.assert_close(elastic, by_hand, rtol=1e-4, atol=1e-4 * float(by_hand.detach().abs().max()))
