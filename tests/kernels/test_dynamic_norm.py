"""Batch norm whose channels take their statistics only from the instances that use them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from den_kernels import DynamicBatchNorm2d, RoutingPlan, dynamic_batch_norm, dynamic_norm
from den_kernels.dynamic_norm import dynamic_batch_norm_reference
from den_kernels.testing import (
    LAYOUTS,
    LEVEL_KINDS,
    assert_as_accurate,
    channel_mask,
    in_layout,
    make_levels,
    make_mask,
    poison_unread,
)

SIZES = (4, 4, 8)
NAMES = ("y", "running_mean", "running_var", "dx", "dweight", "dbias")


@pytest.fixture(params=["C++", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(dynamic_norm, "extension", None)
    elif dynamic_norm.extension is None:
        pytest.skip("den_kernels._C was not built")
    return request.param


def arguments(x: Tensor, affine: bool = True, tracked: bool = True) -> list[Tensor | None]:
    """x, then weight, bias, running mean and running variance, or None; all differ between channels."""
    C, like = x.shape[1], {"dtype": torch.promote_types(x.dtype, torch.float32)}
    weight, bias = torch.linspace(0.5, 2, C, **like), torch.linspace(-1, 1, C, **like)
    running = [torch.linspace(-0.2, 0.3, C, **like), torch.linspace(0.7, 1.6, C, **like)]
    leaves = [x.detach().requires_grad_()]
    leaves += [weight.requires_grad_(), bias.requires_grad_()] if affine else [None, None]
    return leaves + (running if tracked else [None, None])


def results(
    op: Any, x: Tensor, selection: Any, dy: Tensor, affine: bool = True, tracked: bool = True, **settings: Any
) -> dict[str, Tensor]:
    """Output, running statistics and gradients of one call, by name."""
    x, weight, bias, mean, var = arguments(x, affine, tracked)
    y = op(x, selection, weight, bias, mean, var, **settings)
    inputs = [x, weight, bias] if affine else [x]
    gradients = torch.autograd.grad(y, inputs, dy.to(y.dtype), allow_unused=True, materialize_grads=True)
    made = dict(zip(("dx", "dweight", "dbias"), gradients, strict=False))
    return {"y": y.detach(), **made, **({"running_mean": mean, "running_var": var} if tracked else {})}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    narrow = draw(st.booleans())  # C++ folds the maps of a few channels
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 8] if narrow else [8, 17, 40]), min_size=1, max_size=4))
    batch, size = draw(st.integers(1, 6)), draw(st.sampled_from([(1, 2), (3, 3), (4, 8), (7, 5), (16, 20)]))
    kind, seed = draw(st.sampled_from([*LEVEL_KINDS, "mask"])), draw(st.integers(0, 9))
    groups = len(sizes)
    x, dy = torch.randn(2, batch, sum(sizes), *size, generator=torch.Generator().manual_seed(seed)).unbind()
    return {
        "x": x * 2 + 3,
        "dy": dy,
        "selection": make_mask(batch, groups, seed) if kind == "mask" else make_levels(kind, batch, groups, seed),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "settings": {"groups": sizes, "training": draw(st.booleans()), "relu": draw(st.booleans())},
        "optional": {"affine": draw(st.booleans()), "tracked": draw(st.booleans())},
    }


def term_sizes(x: Tensor, dy: Tensor, selection: Tensor, groups: list[int], **settings: Any) -> dict[str, Tensor]:
    """The sizes of the terms that are added up for each gradient; of dx, per channel, the largest of them."""
    used = channel_mask(selection, groups)[:, :, None, None].expand_as(x)
    x, dy = x.double().where(used, 0), dy.double().where(used, 0).abs()
    _, weight, _, mean, var = arguments(x, settings["affine"], settings["tracked"])
    if settings["training"] or mean is None:
        count = used.sum((0, 2, 3)).clamp(min=1)
        mean = x.sum((0, 2, 3)) / count
        var = (x - mean[:, None, None]).where(used, 0).square().sum((0, 2, 3)) / count
    scale = (var + 1e-5).rsqrt() * (1 if weight is None else weight.detach())
    xhat = (x - mean[:, None, None]).where(used, 0) * (var + 1e-5).rsqrt()[:, None, None]
    largest = (dy.amax((0, 2, 3)) * scale)[:, None, None].expand_as(x)
    return {"dx": largest.where(used, 0), "dweight": (dy * xhat.abs()).sum((0, 2, 3)), "dbias": dy.sum((0, 2, 3))}


def sums_of_terms(x: Tensor, dy: Tensor, selection: Tensor, groups: list[int], **settings: Any) -> dict[str, Tensor]:
    """The sizes of all terms of each result, added up: of few values, some are far smaller than their terms."""
    sizes = term_sizes(x, dy, selection, groups, **settings)
    used = channel_mask(selection, groups)[:, :, None, None].expand_as(x)
    count = used.sum((0, 2, 3)).clamp(min=1)
    x, dy = x.double().where(used, 0), dy.double().where(used, 0).abs()
    of_batch = settings["training"] or not settings["tracked"]
    _, weight, bias, before, var = arguments(x, settings["affine"], settings["tracked"])
    mean = x.sum((0, 2, 3)) / count if of_batch else before
    if of_batch:
        var = (x - mean[:, None, None]).where(used, 0).square().sum((0, 2, 3)) / count
    means = x.abs().sum((0, 2, 3)) / count if of_batch else mean.abs()
    xhat = ((x - mean[:, None, None]) * (var + 1e-5).rsqrt()[:, None, None]).where(used, 0).abs()
    scale = ((var + 1e-5).rsqrt() * (1 if weight is None else weight.detach()))[:, None, None]
    sizes["y"] = (x.abs() + means[:, None, None]) * scale + (0 if bias is None else bias.detach().abs()[:, None, None])
    sizes["dx"] = dy * scale
    if of_batch:
        sums, products = (t.sum((0, 2, 3))[:, None, None] / count[:, None, None] for t in (dy, dy * xhat))
        sizes["dx"] = sizes["dx"] + (sums + xhat * products) * scale
    if settings["training"] and settings["tracked"]:
        sizes["running_mean"] = 0.9 * before.abs() + 0.1 * means
    return {name: size.where(used, 0) if size.ndim == 4 else size for name, size in sizes.items()}


def check_against_reference(case: dict[str, Any], dtype: torch.dtype) -> None:
    sizes, selection = case["settings"]["groups"], case["selection"]
    x, dy = (poison_unread(case[name].to(dtype), selection, sizes) for name in ("x", "dy"))
    rest = {**case["settings"], **case["optional"]}
    got = results(dynamic_batch_norm, in_layout(x, case["layout"]), selection, dy, **rest)
    exact = results(dynamic_batch_norm_reference, x.double(), selection, dy.double(), **rest)
    peer = results(dynamic_batch_norm_reference, x.float(), selection, dy.float(), **rest)
    used = channel_mask(selection, sizes)[:, :, None, None].expand_as(x)
    assert bool((got["y"][~used] == 0).all() and (got["dx"][~used] == 0).all())
    scales = sums_of_terms(x, dy, selection, **rest)
    for name in got:
        # Each value is rounded five times (mean, difference, scale, product, sum): of a few, PyTorch's may happen to
        # cancel where ours add up, so that 4 roundings, not 2, is the least that must be allowed.
        assert_as_accurate(got[name], peer[name].to(got[name].dtype), exact[name], scales.get(name), factor=4.0)


@given(case=cases())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpp_equals_the_reference(case: dict[str, Any], dtype: torch.dtype) -> None:
    if dynamic_norm.extension is None:
        pytest.skip("den_kernels._C was not built")
    check_against_reference(case, dtype)


@given(case=cases())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_torch_ops_equal_the_reference(case: dict[str, Any], dtype: torch.dtype) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_norm, "extension", None)
        check_against_reference(case, dtype)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_at_the_full_level_it_is_nn_batch_norm(layout: str, momentum: float | None) -> None:
    ours, theirs = DynamicBatchNorm2d(16, momentum=momentum, groups=SIZES), nn.BatchNorm2d(16, momentum=momentum)
    for step in range(4):
        for norm in (ours, theirs):
            norm.train(step < 3)
        x = in_layout(torch.randn(5, 16, 6, 7) * 3 + 1, layout)
        y, expected = ours(x, torch.full((5,), 3), relu=True), theirs(x).relu()
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-6)
        assert y.stride() == expected.stride()
        for name, buffer in theirs.named_buffers():
            torch.testing.assert_close(getattr(ours, name), buffer, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours(x), nn.BatchNorm2d.forward(ours, x))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("size", [(5, 5), (4, 6)], ids=["odd map", "folded map"])
def test_each_group_is_the_batch_norm_of_the_instances_that_use_it(size: tuple[int, int]) -> None:
    levels = torch.tensor([3, 0, 1, 2, 3, 1])
    x = poison_unread(torch.randn(6, 16, *size), levels, SIZES).requires_grad_()
    norm = DynamicBatchNorm2d(16, groups=SIZES)
    y = norm(x, levels)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    start = 0
    for group, size in enumerate(SIZES):
        users, channels = levels > group, slice(start, start + size)
        part = x.detach()[users][:, channels].requires_grad_()
        mean, var = torch.zeros(size), torch.ones(size)
        expected = F.batch_norm(part, mean, var, training=True)
        (dpart,) = torch.autograd.grad(expected, part, dy[users][:, channels])
        torch.testing.assert_close(y[users][:, channels], expected, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(dx[users][:, channels], dpart, rtol=1e-4, atol=2e-6)
        assert not y[~users][:, channels].any()
        assert not dx[~users][:, channels].any()
        torch.testing.assert_close(norm.running_mean[channels], mean)
        torch.testing.assert_close(norm.running_var[channels], var)
        start += size


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_channels_that_nobody_uses_keep_their_running_statistics(batch: int) -> None:
    norm = DynamicBatchNorm2d(16, groups=SIZES)
    norm.running_mean.fill_(0.25)
    x = torch.full((batch, 16, 4, 4), float("nan"), requires_grad=True)
    y = norm(x, torch.zeros(batch, dtype=torch.int64))
    y.sum().backward()
    assert y.shape == x.shape
    assert not y.any()
    assert not x.grad.any()
    assert not norm.weight.grad.any()
    assert not norm.bias.grad.any()
    assert norm.running_mean.eq(0.25).all()
    assert norm.running_var.eq(1).all()
    assert norm.num_batches_tracked == 1


@pytest.mark.usefixtures("implementation")
def test_a_route_gives_what_its_levels_or_mask_give() -> None:
    x, mask = torch.randn(5, 16, 4, 4), make_mask(5, 3)
    levels = mask.sum(1)
    for selection, plan in (
        (levels, RoutingPlan.from_levels(levels[:, None], 3)),
        (mask, RoutingPlan.from_masks(mask[:, None])),
    ):
        outputs = [DynamicBatchNorm2d(16, groups=SIZES)(x, chosen) for chosen in (selection, plan[0])]
        assert torch.equal(*outputs)
    stream = DynamicBatchNorm2d(16)(x, plan[0].active())
    assert torch.equal(stream.flatten(1).any(1), mask.any(1))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_mean_does_not_cancel(dtype: torch.dtype) -> None:
    x = (torch.randn(8, 16, 20, 20) * 8 + 3000).to(dtype)
    mean, var = torch.zeros(16), torch.zeros(16)
    dynamic_batch_norm(x, torch.full((8,), 3), None, None, mean, var, groups=SIZES, training=True, momentum=1.0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3)), rtol=1e-4, atol=0)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("channels", [12, 64])
def test_the_result_does_not_depend_on_the_number_of_threads(channels: int) -> None:
    x, dy = torch.randn(2, 9, channels, 20, 20).unbind()
    runs = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        sizes = (channels // 4, channels // 4, channels // 2)
        runs.append(results(dynamic_batch_norm, x, torch.arange(9) % 4, dy, groups=sizes, training=True, relu=True))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(16, 16, 32), (64, 64, 128), (20, 13, 68), (3, 1, 7)])
def test_widths_of_whole_and_of_broken_vectors_equal_float64(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(5, sum(sizes), 9, 7).to(dtype)
    dy, levels = torch.randn_like(x), torch.tensor([0, 1, 2, 3, 3])
    weight, bias = torch.rand(sum(sizes)) + 0.5, torch.randn(sum(sizes))

    def both_ways(kind: torch.dtype) -> list[Tensor]:
        leaves = [t.to(kind).requires_grad_() for t in (x, weight, bias)]
        y = dynamic_batch_norm(leaves[0], levels, *leaves[1:], None, None, groups=sizes, training=True)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(kind))]

    for made, wanted in zip(both_ways(dtype), both_ways(torch.float64), strict=True):
        close = {"rtol": 2e-2, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(made.double(), wanted, **close)


def test_called_as_an_op_it_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def both_ways() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        x, levels = torch.randn(4, 16, 5, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
        y = dynamic_batch_norm(x, levels, None, None, None, None, groups=SIZES, training=True, relu=True)
        return y.detach(), *torch.autograd.grad(y.square().sum(), x)

    plain = both_ways()
    monkeypatch.setattr(dynamic_norm, "is_ordinary", lambda *_: False)
    assert all(map(torch.equal, plain, both_ways()))


def test_nan_in_a_used_channel_passes_through_like_in_batch_norm() -> None:
    x = torch.randn(3, 16, 4, 4)
    x[0, 5, 0, 0] = float("nan")
    y = DynamicBatchNorm2d(16, groups=SIZES)(x, torch.tensor([2, 3, 1]), relu=True)
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[:2, 5] = True
    assert torch.equal(y.isnan(), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_gradcheck_in_float64(training: bool, relu: bool) -> None:
    x, weight, bias, mean, var = arguments(torch.randn(4, 6, 2, 3, dtype=torch.float64))

    def norm(*leaves: Tensor) -> Tensor:
        settings = {"groups": (2, 1, 3), "training": training, "relu": relu}
        return dynamic_batch_norm(leaves[0], torch.tensor([3, 0, 2, 2]), *leaves[1:], mean, var, **settings)

    assert torch.autograd.gradcheck(norm, (x, weight, bias))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_one_gradient_alone_equals_the_same_of_all(wanted: str) -> None:
    x, weight, bias, mean, var = arguments(torch.randn(4, 16, 4, 4))
    leaves = {"x": x, "weight": weight, "bias": bias}
    dy, levels = torch.randn_like(x), torch.tensor([3, 1, 0, 2])

    def gradients(needed: list[str]) -> tuple[Tensor, ...]:
        given = [leaf if name in needed else leaf.detach() for name, leaf in leaves.items()]
        y = dynamic_batch_norm(given[0], levels, *given[1:], mean, var, groups=SIZES, training=True, relu=True)
        return torch.autograd.grad(y, [leaves[name] for name in needed], dy)

    assert torch.equal(gradients([wanted])[0], gradients(list(leaves))[list(leaves).index(wanted)])


def test_gradients_not_needed_are_not_computed() -> None:
    if dynamic_norm.extension is None:
        pytest.skip("den_kernels._C was not built")
    x, weight, bias, mean, var = (leaf.detach() for leaf in arguments(torch.randn(4, 16, 4, 4)))
    statistics = torch.stack([mean, var, torch.full_like(mean, 32)])
    given = (x, x, make_mask(4, 3), statistics, weight, bias, SIZES, 1e-5, True)
    dx, sums = torch.ops.den_kernels.dynamic_norm_backward(*given, False, True, False)
    assert (dx.shape, sums.numel()) == (x.shape, 0)
    dx, sums = torch.ops.den_kernels.dynamic_norm_backward(*given, True, False, True)
    assert (dx.numel(), sums.shape) == (0, (2, 16))
