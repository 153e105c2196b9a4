"""The block of an ordinary ResNet (conv, bn, ReLU, conv, bn, sum, ReLU) through `dynamic_residual`."""

import pytest
import torch
from torch import nn

from den_kernels import DynamicConv2d, ResidualWeights, dynamic_residual, dynamic_residual_
from den_kernels._residual_gpu import masked_branch
from den_kernels.plan import as_route
from den_kernels.testing import assert_as_accurate, channel_mask, make_levels, make_mask


def random_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    for values, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -0.5, 0.5), (norm.running_var, 0.5, 2)):
        nn.init.uniform_(values, low, high)
    nn.init.normal_(norm.running_mean, 0, 0.3)
    return norm


class BasicBlock(nn.Module):
    """As torchvision writes it, but that hidden channels are masked: the oracle."""

    def __init__(self, channels, groups, out_channels=None, stride=1, projected=False, bias=False):
        super().__init__()
        M, out_channels = sum(groups), out_channels or channels
        self.conv1 = nn.Conv2d(channels, M, 3, stride, 1, bias=bias)
        self.bn1 = random_norm(M)
        self.conv2 = nn.Conv2d(M, out_channels, 3, 1, 1, bias=bias)
        self.bn2 = random_norm(out_channels)
        self.downsample = None
        if projected:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, stride, bias=False), random_norm(out_channels)
            )
        self.groups = groups
        self.eval()

    def shortcut(self, x):
        if self.downsample is not None:
            return self.downsample(x)
        stride = self.conv1.stride[0]
        y = nn.functional.avg_pool2d(x, stride, ceil_mode=True) if stride > 1 else x
        return nn.functional.pad(y, (0, 0, 0, 0, 0, self.conv2.out_channels - y.shape[1]))

    @torch.no_grad()
    def forward(self, x, selection):
        channels = channel_mask(selection, self.groups)[:, :, None, None]
        hidden = torch.where(channels, self.bn1(self.conv1(x)).relu(), 0)
        branch = torch.where(channels.any(1, keepdim=True), self.bn2(self.conv2(hidden)), 0)
        return (self.shortcut(x) + branch).relu()

    def fold(self):
        conv1 = DynamicConv2d.from_conv(self.conv1, out_groups=self.groups)
        return ResidualWeights.fold(conv1, self.bn1, self.conv2, self.bn2, post_activation=True)


def image(*shape, dtype=torch.float32):
    """The output of a ReLU."""
    return torch.randn(shape).relu().to(dtype).contiguous(memory_format=torch.channels_last)


CASES = {
    "keeps its shape": ({"channels": 64, "groups": (16, 16, 32)}, (5, 64, 8, 8)),
    "odd channels": ({"channels": 20, "groups": (5, 7)}, (5, 20, 9, 6)),
    "biases": ({"channels": 16, "groups": (8, 24), "bias": True}, (4, 16, 6, 6)),
    "pooled shortcut": ({"channels": 16, "groups": (16, 16), "out_channels": 32, "stride": 2}, (5, 16, 7, 7)),
    "projected shortcut": (
        {"channels": 16, "groups": (16, 16), "out_channels": 32, "stride": 2, "projected": True},
        (5, 16, 8, 8),
    ),
    "projected, same shape": ({"channels": 16, "groups": (16, 16), "projected": True}, (5, 16, 8, 8)),
}


@torch.no_grad()
def run(block, x, selection, weights=None):
    shortcut = None if block.downsample is None else block.downsample(x)
    return dynamic_residual(x, selection, weights or block.fold(), shortcut)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["uniform", "zero", "mask"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_masked_block(case, kind, dtype):
    make, shape = CASES[case]
    block, x = BasicBlock(**make).to(dtype), image(*shape, dtype=dtype)
    sizes = shape[0], len(block.groups)
    selection = make_mask(*sizes) if kind == "mask" else make_levels(kind, *sizes)
    selection[1] = 0
    got = run(block, x, selection)
    assert got.is_contiguous(memory_format=torch.channels_last)
    peer = block(x, selection)
    exact = block.double()(x.double(), selection)
    if dtype == torch.float64:
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    else:
        assert_as_accurate(got, peer, exact, factor=4 if dtype == torch.float32 else 2)
    idle = selection.view(shape[0], -1).sum(1) == 0
    with torch.no_grad():
        assert torch.equal(got[idle], block.to(dtype).shortcut(x).relu()[idle])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["keeps its shape", "pooled shortcut"])
def test_in_place_equals_functional(case, dtype):
    make, shape = CASES[case]
    block, x = BasicBlock(**make).to(dtype), image(*shape, dtype=dtype)
    levels = make_levels("uniform", shape[0], len(block.groups))
    expected, before = run(block, x, levels), x.clone()
    assert torch.equal(x, before)
    got = dynamic_residual_(x, levels, block.fold())
    assert torch.equal(got, expected)
    assert (got is x) == (case == "keeps its shape")


@pytest.mark.parametrize("case", CASES)
def test_the_masked_composition_of_other_devices_agrees(case):
    make, shape = CASES[case]
    block, x = BasicBlock(**make), image(*shape)
    levels = make_levels("uniform", shape[0], len(block.groups))
    with torch.no_grad():
        out = block.shortcut(x).contiguous(memory_format=torch.channels_last).clone()
    out.add_(masked_branch(x, as_route(levels, len(block.groups), shape[0]), block.fold()))
    torch.testing.assert_close(out.relu(), run(block, x, levels), rtol=1e-5, atol=1e-5)


def test_an_ordinary_convolution_is_one_group_that_may_be_skipped():
    block, x = BasicBlock(32, (32,)), image(3, 32, 8, 8)
    weights = ResidualWeights.fold(block.conv1, block.bn1, block.conv2, block.bn2, post_activation=True)
    got = dynamic_residual(x, torch.tensor([1, 0, 1]), weights)
    with torch.no_grad():
        whole = (block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())) + x).relu()
    torch.testing.assert_close(got[[0, 2]], whole[[0, 2]], rtol=1e-4, atol=1e-5)
    assert torch.equal(got[1], x[1])


@pytest.mark.parametrize("case", ["keeps its shape", "projected shortcut"])
def test_opcheck_and_one_compiled_graph(case):
    from den_kernels.dynamic_residual import OPERANDS

    make, shape = CASES[case]
    block, x = BasicBlock(**make), image(*shape)
    weights, levels = block.fold(), make_levels("uniform", shape[0], len(block.groups))
    with torch.no_grad():
        shortcut = None if block.downsample is None else block.downsample(x)
    operands = OPERANDS.of(as_route(levels, len(block.groups), shape[0]), weights)
    arguments = (x, *operands, shortcut)
    torch.library.opcheck(torch.ops.den_kernels.dynamic_residual, arguments)
    if weights.stride == 1:
        torch.library.opcheck(torch.ops.den_kernels.dynamic_residual_, (x, *operands))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, levels):
        return dynamic_residual(x, levels, weights, shortcut), dynamic_residual_(x + 0, levels, weights)

    got, in_place = compiled(x, levels)
    assert torch.equal(got, dynamic_residual(x, levels, weights, shortcut))
    assert torch.equal(in_place, dynamic_residual(x, levels, weights))


@pytest.mark.parametrize(
    ("shortcut", "error", "message"),
    [
        (torch.zeros(2, 16, 4, 4), ValueError, r"shortcut must be \[2, 32, 4, 4\] on cpu, got \[2, 16, 4, 4\]"),
        (torch.zeros(2, 32, 4, 4, device="meta"), ValueError, "on cpu, got .* on meta"),
        (torch.zeros(2, 32, 4, 4).double(), TypeError, "shortcut must be torch.float32 as x is, got torch.float64"),
        (torch.zeros(2, 32, 4, 4).requires_grad_(), ValueError, "shortcut must not require a gradient"),
    ],
)
def test_bad_shortcuts(shortcut, error, message):
    weights = BasicBlock(16, (16, 16), 32, 2).fold()
    with pytest.raises(error, match=message):
        dynamic_residual(image(2, 16, 8, 8), torch.tensor([1, 2]), weights, shortcut)


def test_it_needs_its_first_norm():
    block = BasicBlock(16, (16, 16))
    with pytest.raises(ValueError, match="bn1 must be a batch norm in a post-activation block, got None"):
        ResidualWeights.fold(block.conv1, None, block.conv2, block.bn2, post_activation=True)
