"""The residual block as two launches, against its reference: values, and what must stay untouched."""

import pytest
import torch
from torch import nn

from den_kernels import DynamicConv2d
from den_kernels._triton import norm, residual
from den_kernels._triton.convolve import convolve
from den_kernels._triton.residual import add_branch
from den_kernels.dynamic_residual import dynamic_residual_reference
from den_kernels.plan import as_route
from den_kernels.residual_weights import ResidualWeights
from den_kernels.rows import pool_rows
from den_kernels.testing import channel_mask, make_levels, make_mask
from tests.on_gpu import close_by_instance
from tests.release import always


def random_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels).eval()
    for values, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -1, 1), (norm.running_var, 0.5, 2)):
        nn.init.uniform_(values, low, high)
    nn.init.normal_(norm.running_mean)
    return norm


def random_block(C: int, M: int, C_out: int, groups: tuple[int, ...], stride: int, bias: bool = True) -> tuple:
    conv1 = DynamicConv2d(C, M, 3, stride, 1, bias=bias, out_groups=groups)
    return conv1, random_norm(C), nn.Conv2d(M, C_out, 3, 1, 1, bias=bias), random_norm(M)


def fold(block: tuple, dtype: torch.dtype, post_activation: bool = False) -> ResidualWeights:
    conv1, norm1, conv2, norm2 = block
    return ResidualWeights.fold(conv1.to(dtype), norm1, conv2.to(dtype), norm2, post_activation=post_activation)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.release)], ids=str
)
@pytest.mark.parametrize("selection", ["levels", "mask"])
@pytest.mark.parametrize(
    ("C", "M", "C_out", "groups", "stride"),
    [(16, 64, 16, (16, 16, 32), 1), (16, 32, 32, (16, 16), 2), (20, 24, 24, (5, 11, 8), 1)],
)
def test_block_adds_the_reference_branch(C, M, C_out, groups, stride, selection, dtype):
    block = random_block(C, M, C_out, groups, stride)
    chosen = make_mask(4, len(groups)) if selection == "mask" else torch.tensor([len(groups), 0, 1, 2])
    chosen[1] = 0
    route = as_route(chosen, len(groups), 4)
    x = torch.randn(4, C, 6, 5).bfloat16().to(dtype).contiguous(memory_format=torch.channels_last)
    weights = fold(block, dtype)
    out = pool_rows(x, C_out, stride)
    shortcut = out.clone()
    add_branch(x, out, route, weights)
    exact = dynamic_residual_reference(x.double(), route, fold(block, torch.float64))
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    close_by_instance(out, exact, tolerance)
    idle = route.levels == 0
    assert idle.any()
    assert torch.equal(out[idle], shortcut[idle])


def test_block_in_place_without_bias_and_first_norm():
    block = random_block(16, 32, 16, (16, 16), 1, bias=False)
    block = (block[0], None, *block[2:])
    route = as_route(make_levels("uniform", 5, 2), 2, 5)
    x = torch.randn(5, 16, 5, 5).contiguous(memory_format=torch.channels_last)
    exact = dynamic_residual_reference(x.double(), route, fold(block, torch.float64))
    weights = fold(block, torch.float32)
    add_branch(x, x, route, weights)
    torch.testing.assert_close(x.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("C_out", "stride"), [(16, 1), (32, 2)])
def test_post_activation_block(C_out, stride, dtype):
    conv1, _, conv2, _ = random_block(16, 32, C_out, (16, 16), stride)
    block = conv1, random_norm(32), conv2, random_norm(C_out)
    route = as_route(torch.tensor([2, 0, 1, 2]), 2, 4)
    x = torch.randn(4, 16, 6, 5).relu().bfloat16().to(dtype).contiguous(memory_format=torch.channels_last)
    out = pool_rows(x, C_out, stride)
    add_branch(x, out, route, fold(block, dtype, True))
    exact = dynamic_residual_reference(x.double(), route, fold(block, torch.float64, True))
    assert (exact == 0).any()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}[dtype]
    close_by_instance(out, exact, tolerance)


def test_hidden_channels_that_are_not_selected_are_not_even_written(monkeypatch):
    """No launch clears them: they still hold what the allocation held, NaN here, and no result is spoilt by that."""
    made = []

    def spied(*arguments, **keywords):
        made.append((arguments[2], torch.isnan(arguments[2]).all().item()))
        return convolve(*arguments, **keywords)

    monkeypatch.setattr(residual, "convolve", spied)
    groups, levels = (16, 16, 32), torch.tensor([1, 3, 0, 2])
    block = random_block(16, 64, 16, groups, 1)
    x = torch.randn(4, 16, 5, 5).contiguous(memory_format=torch.channels_last)
    add_branch(x, x, as_route(levels, 3, 4), fold(block, torch.float32))
    (hidden, was_empty), (stream, _) = made
    assert was_empty
    assert stream is x
    used = channel_mask(levels, groups)[:, :, None, None].expand_as(hidden)
    assert hidden[~used].isnan().all()
    assert not hidden[used].isnan().any()
    assert not x.isnan().any()


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.release), torch.bfloat16], ids=str)
@pytest.mark.parametrize("selection", always(["levels", "mask", "odd mask"], "levels", "odd mask"))
def test_a_block_writes_what_the_next_one_reads(selection, dtype):
    """The same bits as a pass gives, for all that the next block uses, at level 0 here or not; nothing else."""
    groups = (5, 11, 8) if selection == "odd mask" else (16, 16, 32)
    first, second = (fold(random_block(16, sum(groups), 16, groups, 1), dtype) for _ in range(2))
    here, there = torch.tensor([3, 0, 1, 0, 2]), torch.tensor([1, 2, 0, 0, 3])
    if selection != "levels":
        here, there = (torch.arange(3) < chosen[:, None] for chosen in (here, there))
    routes = as_route(here, 3, 5), as_route(there, 3, 5)
    x = torch.randn(5, 16, 6, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    x[1, 0, 0] = -0.0  # an instance at level 0 keeps its bits
    alone = x.clone(memory_format=torch.channels_last)
    add_branch(alone, alone, routes[0], first)
    passed = norm.activate(alone, routes[1].levels, second.scale1, second.shift1)
    before = x.clone()
    activated = add_branch(x, x, routes[0], first, following=residual.Next.of(second, routes[1]))
    assert torch.equal(x, alone)
    assert torch.equal(x[1].signbit(), before[1].signbit())
    used = routes[1].levels > 0
    assert torch.equal(activated[used], passed[used])
    assert activated[~used].isnan().all()
    assert passed[~used].isnan().all()
    after = alone.clone(memory_format=torch.channels_last)
    add_branch(after, after, routes[1], second)
    assert add_branch(x, x, routes[1], second, activated) is None
    assert torch.equal(x, after)


def test_instance_at_level_0_is_neither_read_nor_written():
    block = random_block(16, 32, 16, (16, 16), 1)
    route = as_route(torch.tensor([0, 2, 0]), 2, 3)
    x = torch.randn(3, 16, 5, 5).contiguous(memory_format=torch.channels_last)
    x[0] = x[2] = float("nan")
    add_branch(x, x, route, fold(block, torch.float32))
    assert x[[0, 2]].isnan().all()
    assert not x[1].isnan().any()
