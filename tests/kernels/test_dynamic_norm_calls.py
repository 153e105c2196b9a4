"""The elastic batch norm as an op, compiled, exported and as a module, and what it refuses."""

import copy

import pytest
import torch

from den_kernels import DynamicBatchNorm2d, RoutingPlan, dynamic_batch_norm, dynamic_norm
from den_kernels.testing import (
    make_mask,
)
from tests.kernels.test_dynamic_norm import SIZES, arguments, implementation  # noqa: F401  a fixture


@pytest.mark.parametrize("training", [True, False])
def test_opcheck(training: bool) -> None:
    if dynamic_norm.extension is None:
        pytest.skip("den_kernels._C was not built")
    x, weight, bias, mean, var = arguments(torch.randn(4, 16, 4, 4).to(memory_format=torch.channels_last))
    statistics = None if training else torch.stack([mean, var, torch.ones(16)])
    tail = (weight, bias, SIZES, 1e-5, True)
    torch.library.opcheck(torch.ops.den_kernels.dynamic_norm.default, (x, make_mask(4, 3), statistics, *tail))
    given = torch.stack([mean, var, torch.full_like(mean, 32)])
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            torch.ops.den_kernels.dynamic_norm_backward.default,
            (
                x.detach(),
                x.detach(),
                make_mask(4, 3),
                given,
                weight.detach(),
                bias.detach(),
                *tail[2:],
                training,
                *needs,
            ),
        )


def compiled_equals_eager(backend: str) -> None:
    eager = DynamicBatchNorm2d(16, momentum=None, groups=SIZES)
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    route = RoutingPlan.from_levels(torch.tensor([[3], [0], [2], [1]]), 3)[0]
    for _ in range(2):
        x, dy = torch.randn(2, 4, 16, 5, 5).unbind()
        gradients = []
        for norm in (eager, compiled):
            leaf = x.clone().requires_grad_()
            y = norm(leaf, route, relu=True)
            gradients.append((y.detach(), *torch.autograd.grad(y, [leaf, *norm.parameters()], dy)))
        torch.testing.assert_close(*gradients)
    torch.testing.assert_close(dict(eager.named_buffers()), dict(module.named_buffers()))


@pytest.mark.usefixtures("implementation")
def test_traced_by_compile_without_a_break_it_equals_eager() -> None:
    compiled_equals_eager("aot_eager")


@pytest.mark.slow
def test_compiled_it_equals_eager() -> None:
    compiled_equals_eager("inductor")


@pytest.mark.usefixtures("implementation")
def test_exported_it_equals_eager() -> None:
    norm = DynamicBatchNorm2d(16, groups=SIZES).eval()
    x, mask = torch.randn(4, 16, 5, 5), make_mask(4, 3)
    torch.testing.assert_close(torch.export.export(norm, (x, mask)).module()(x, mask), norm(x, mask))


def test_without_running_statistics_eval_uses_those_of_the_batch() -> None:
    norm, x, levels = DynamicBatchNorm2d(16, track_running_stats=False, groups=SIZES), torch.randn(4, 16, 5, 5), 3
    training = norm(x, torch.full((4,), levels))
    assert torch.equal(norm.eval()(x, torch.full((4,), levels)), training)


def test_autocast_keeps_the_dtype_of_the_input() -> None:
    norm, levels = DynamicBatchNorm2d(16, groups=SIZES), torch.tensor([1, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(torch.randn(2, 16, 4, 4), levels).dtype == torch.float32
        assert norm(torch.randn(2, 16, 4, 4).bfloat16(), levels).dtype == torch.bfloat16


def test_a_copy_and_a_bfloat16_module_work() -> None:
    norm = copy.deepcopy(DynamicBatchNorm2d(16, groups=(4, 12))).bfloat16()
    x = torch.randn(4, 16, 4, 4, dtype=torch.bfloat16)
    norm(x, torch.tensor([2, 1, 0, 2])).sum().backward()
    assert norm.weight.grad.dtype == norm.running_var.dtype == torch.bfloat16
    assert "groups=(4, 12)" in repr(norm)


@pytest.mark.usefixtures("implementation")
def test_a_single_value_of_a_channel_is_an_error_while_training() -> None:
    norm, x = DynamicBatchNorm2d(16, groups=SIZES), torch.randn(3, 16, 1, 1)
    with pytest.raises(ValueError, match="more than one value while training, got one value of channel 4"):
        norm(x, torch.tensor([1, 2, 1]))
    norm(x, torch.tensor([3, 3, 0]))
    norm.eval()(x, torch.tensor([1, 2, 1]))


X, FULL, VECTOR = torch.randn(2, 16, 4, 4), torch.tensor([3, 3]), torch.ones(16)
BAD = {
    "rank": (X[0], FULL, {}, ValueError, r"x must be \[B, C, H, W\], got shape \[16, 4, 4\]"),
    "dtype": (X.int(), FULL, {}, TypeError, "x must be a floating point tensor, got torch.int32"),
    "group sizes": (
        X,
        FULL,
        {"groups": (4, 4, 4)},
        ValueError,
        r"must add up to the 16 channels of x, got \[4, 4, 4\]",
    ),
    "negative size": (X, FULL, {"groups": (4, -4, 16)}, ValueError, "must add up to the 16 channels"),
    "weight": (X, FULL, {"weight": torch.ones(8)}, ValueError, r"weight must be \[16\], got shape \[8\]"),
    "bias": (X, FULL, {"bias": torch.ones(1, 16)}, ValueError, r"bias must be \[16\], got shape \[1, 16\]"),
    "one running": (X, FULL, {"running_var": None}, ValueError, "must be both tensors or both None"),
    "weight device": (X, FULL, {"weight": torch.ones(16, device="meta")}, ValueError, "weight must be on cpu like x"),
    "level range": (X, torch.tensor([1, 4]), {}, ValueError, "levels must be in 0..3, got 4"),
    "level count": (X, torch.tensor([1, 2, 3]), {}, ValueError, r"levels must be \[2\]"),
    "mask width": (X, torch.ones(2, 4, dtype=torch.bool), {}, ValueError, r"mask must be \[2, 3\]"),
    "level dtype": (X, torch.ones(2), {}, TypeError, "integer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case: str) -> None:
    x, selection, changed, error, message = BAD[case]
    given = {"weight": VECTOR, "bias": VECTOR, "running_mean": VECTOR, "running_var": VECTOR, "groups": SIZES}
    with pytest.raises(error, match=message):
        dynamic_batch_norm(x, selection, **{**given, **changed})


def test_a_module_refuses_groups_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"DynamicBatchNorm2d: groups must .* add up to 16 channels"):
        DynamicBatchNorm2d(16, groups=(4, 4))
    with pytest.raises(ValueError, match="4D input"):
        DynamicBatchNorm2d(16)(torch.randn(2, 16), torch.tensor([1, 1]))
