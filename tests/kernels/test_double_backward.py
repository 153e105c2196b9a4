"""Gradients of gradients (create_graph) and what may change between forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from den_kernels import DynamicBatchNorm2d, DynamicConv2d, RoutingPlan, dynamic_batch_norm, dynamic_conv2d
from den_kernels.plan import as_route
from den_kernels.testing import channel_mask

LEVELS = torch.tensor([0, 2, 1])
MASK = torch.tensor([[False, True], [True, True], [False, False]])
CONVOLUTIONS = {
    "out": {"out_groups": (1, 2)},
    "in": {"in_groups": (2, 2), "stride": 2},
    "both": {"out_groups": (1, 2), "in_groups": (3, 1), "dilation": 2},
    "same": {"out_groups": (1, 2), "padding": "same"},
}


class Seen(TorchDispatchMode):
    """A mode that changes nothing: the ops go through torch.library."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def doubles(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("selection", [LEVELS, MASK], ids=["levels", "mask"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name, selection):
    keywords = {"padding": 1, **CONVOLUTIONS[name]}
    x, weight, bias = doubles((3, 4, 4, 3), (3, 4, 3, 2), (3,))
    assert gradgradcheck(lambda *t: dynamic_conv2d(*t, selection, **keywords), (x, weight, bias))


def test_depthwise_convolution():
    x, weight = doubles((3, 4, 4, 3), (4, 1, 3, 3))
    keywords = {"padding": 1, "groups": 4, "out_groups": 2, "in_groups": 2}
    assert gradgradcheck(lambda *t: dynamic_conv2d(*t, None, LEVELS, **keywords), (x, weight))


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("selection", [LEVELS, MASK], ids=["levels", "mask"])
def test_norm(selection, training, relu):
    x, weight, bias = doubles((3, 4, 3, 3), (4,), (4,))
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)

    def norm(x, weight, bias):
        statistics = (None, None) if training else (mean, var)
        return dynamic_batch_norm(
            x, selection, weight, bias, *statistics, groups=(1, 3), training=training, relu=relu
        )  # fmt: skip

    assert gradgradcheck(norm, (x, weight, bias))


def layers(x, selection, conv, norm):
    return norm(conv(x, selection), selection, relu=True)


def equation(x, selection, conv, norm):
    """`layers` as plain torch operations."""
    used = channel_mask(as_route(selection, 2, len(x)).selection(), conv.out_groups)[:, :, None, None]
    y = torch.where(used, F.conv2d(x, conv.weight, conv.bias, padding=1), 0)
    n = (used.sum(0) * y[0, 0].numel()).clamp(min=1)
    mean = y.sum((0, 2, 3))[:, None, None] / n
    centred = torch.where(used, y - mean, 0)
    var = centred.square().sum((0, 2, 3))[:, None, None] / n
    y = centred * torch.rsqrt(var + norm.eps) * norm.weight[:, None, None] + norm.bias[:, None, None]
    return torch.where(used, y.relu(), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("through_library", [False, True], ids=["eager", "torch.library"])
@pytest.mark.parametrize("selection", [LEVELS, MASK], ids=["levels", "mask"])
def test_gradient_penalty_is_the_equations(selection, through_library, dtype):
    """The incoming gradient is that of a sum, which needs no gradient itself; the kernels' dtypes."""
    torch.manual_seed(0)
    conv = DynamicConv2d(16, 16, 3, padding=1, out_groups=(4, 12)).to(dtype)
    norm = DynamicBatchNorm2d(16, groups=(4, 12), track_running_stats=False).to(dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    parameters = [conv.weight, norm.weight]
    x = torch.randn(3, 16, 4, 4, dtype=dtype).requires_grad_()
    with torch.no_grad():  # a sum of a norm's outputs has no gradient: weights for it
        weights = torch.randn(3, 16, 4, 4, dtype=dtype)

    def penalty(function):
        y = function(x, selection, conv, norm)
        (dx,) = grad((y * weights).sum(), x, create_graph=True)
        return grad((0 * y.mean() + dx.square().sum()).float(), parameters)

    if through_library:
        with Seen():
            found = penalty(layers)
    else:
        found = penalty(layers)
    rtol = 1e-4 if dtype == torch.float32 else 0.1
    for got, wanted in zip(found, penalty(equation), strict=True):
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


def test_float16_has_second_derivatives_too():
    conv, x = DynamicConv2d(4, 4, 3, out_groups=2).half(), torch.randn(3, 4, 5, 5).half().requires_grad_()
    (dx,) = grad(conv(x, LEVELS).sum(), x, create_graph=True)
    (dweight,) = grad(dx.float().square().sum(), conv.weight)
    assert dweight.isfinite().all()
    assert dweight.abs().max() > 0


def test_unread_channels_may_hold_nan():
    conv, x = DynamicConv2d(4, 4, 3, in_groups=2), torch.randn(2, 4, 5, 5)
    x[0, 2:] = float("nan")
    x.requires_grad_()
    (dx,) = grad(conv(x, torch.tensor([1, 2])).sum(), x, create_graph=True)
    assert grad(dx.square().sum(), conv.weight)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["levels", "mask"])
@pytest.mark.parametrize("through_library", [False, True], ids=["eager", "torch.library"])
def test_a_plan_changed_between_forward_and_backward_is_noticed(kind, through_library):
    selected = torch.tensor([[0], [1], [2]]) if kind == "levels" else MASK[:, None]
    make = RoutingPlan.from_levels if kind == "levels" else RoutingPlan.from_masks
    plan = make(selected)
    conv, x = DynamicConv2d(16, 16, 3, padding=1, out_groups=2), torch.randn(3, 16, 4, 4, requires_grad=True)
    if through_library:
        with Seen():
            y = conv(x, plan[0]).square().sum()
    else:
        y = conv(x, plan[0]).square().sum()
    right = grad(y, [x, conv.weight], retain_graph=True)
    assert all(map(torch.equal, right, grad(y, [x, conv.weight], retain_graph=True)))
    plan.update_(selected.flip(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad(y, x)


@pytest.mark.parametrize("kind", ["levels", "mask"])
def test_the_norm_keeps_the_gradient_of_its_forward(kind):
    selected = torch.tensor([[0], [1], [2]]) if kind == "levels" else MASK[:, None]
    plan = (RoutingPlan.from_levels if kind == "levels" else RoutingPlan.from_masks)(selected)
    norm, x = DynamicBatchNorm2d(16, groups=2), torch.randn(3, 16, 4, 4, requires_grad=True)
    y = norm(x, plan[0]).pow(3).sum()
    (right,) = grad(y, x, retain_graph=True)
    plan.update_(selected.flip(0))
    try:
        assert torch.equal(grad(y, x)[0], right)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017


def test_a_plan_made_in_inference_mode_trains():
    with torch.inference_mode():
        plan = RoutingPlan.from_levels(LEVELS[:, None], 2)
    conv, x = DynamicConv2d(16, 16, 3, padding=1, out_groups=2), torch.randn(3, 16, 4, 4, requires_grad=True)
    wanted = grad(conv(x, LEVELS).square().sum(), x)[0]
    y = conv(x, plan[0]).square().sum()
    with torch.inference_mode():
        plan.update_(LEVELS.flip(0)[:, None])
    assert torch.equal(grad(y, x)[0], wanted)
