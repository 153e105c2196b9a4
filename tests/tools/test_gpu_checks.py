"""That the checks of tests/gpu find what is wrong: on a CPU, and on a simulated GPU."""

import pytest
import torch
from torch import Tensor

from den_kernels import RoutingPlan, dynamic_conv2d, dynamic_residual
from den_kernels.testing import LAYOUTS, ConvCase, in_layout
from tests.gpu import conftest, test_blocks, test_composition, test_convolution, test_graphs
from tests.on_gpu import Context, close_by_instance, moved
from tests.simulated_gpu import Device, simulated

CPU, GPU = Context("cpu", tiny=True), Context("cuda:0", tiny=True)


@pytest.fixture
def gpu(monkeypatch):
    with simulated(monkeypatch):
        yield


def test_a_gpu_that_is_not_there_or_too_old_is_a_reason(monkeypatch):
    needed = "needs a CUDA device of capability 8.0 or newer: "
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert conftest.reason_to_skip() == f"{needed}none here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    for capability, reason in (((7, 5), f"{needed}Tesla T4 has 7.5"), ((8, 0), None), ((12, 1), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert conftest.reason_to_skip() == reason


def test_the_simulated_gpu_sees_what_a_cpu_forgives(gpu):
    x = torch.ones(3, device="cuda:0")
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="synchronizing"), test_graphs.waiting_is_an_error(GPU):
        x.sum().item()
    with pytest.raises(RuntimeError, match="capturing"):
        test_graphs.Recording(lambda: x.cpu(), GPU)


def test_levels_out_of_range_are_clamped_or_found_where_asked(gpu):
    levels = torch.tensor([[1], [4], [-1]]).to("cuda:0")
    with test_graphs.waiting_is_an_error(GPU):
        plan = RoutingPlan.from_levels(levels, 3)
    assert plan.levels.cpu().tolist() == [[1], [3], [0]]
    with pytest.raises(ValueError, match=r"levels must be in 0\.\.3, got 4 for instance 1, block 0"):
        RoutingPlan.from_levels(levels, 3, check=True)
    with pytest.raises(RuntimeError, match="synchronizing"), test_graphs.waiting_is_an_error(GPU):
        RoutingPlan.from_levels(levels, 3, check=True)


def test_a_graph_that_keeps_its_first_route_is_found_out(gpu, monkeypatch):
    update = RoutingPlan.update_

    def unless_recording(plan, levels):
        return plan if Device.current.recording is not None else update(plan, levels)

    monkeypatch.setattr(RoutingPlan, "update_", unless_recording)
    with pytest.raises(AssertionError, match="a replay differs"):
        test_graphs.test_block_graph(GPU)


def spoil(y: Tensor) -> Tensor:
    return y + torch.nn.functional.one_hot(torch.tensor(5), y.numel()).view(y.shape) * 0.1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (spoil, "y: element"),
        (lambda y: y * float("nan"), "y: element"),
        (lambda y: y + torch.rand(()) * 1e-9 * y.detach().abs().max(), "different bits"),
        (lambda y: y * 1 + 0.01 * (y - y.detach()), "dx: element"),  # the value is right, the gradient is not
    ],
)
def test_a_wrong_convolution_is_found_out(fault, words):
    case = ConvCase(batch=2, channels=(8, 1), out_sizes=(8, 8), selection="top")
    test_convolution.check_convolution(case, "float32", CPU)
    with pytest.raises(AssertionError, match=words):
        test_convolution.check_convolution(case, "float32", CPU, lambda *a, **k: fault(dynamic_conv2d(*a, **k)))


def test_one_wrong_instance_is_found_out():
    exact = torch.randn(4, 3, 5, 5)
    got = exact.clone()
    assert close_by_instance(got, exact, 1e-6) == 0
    got[2] = exact[1]
    with pytest.raises(AssertionError, match="instance 2"):
        close_by_instance(got, exact, 1e-2)
    got = exact.clone()
    got[1, 0, 0, 0] = float("nan")
    with pytest.raises(AssertionError, match="NaN"):
        close_by_instance(got, exact, 1e-2)


def test_a_plan_that_differs_is_found_out():
    plan, other = (RoutingPlan.from_levels(torch.tensor([[1], [level]]), 2) for level in (1, 2))
    with pytest.raises(AssertionError, match=r"plan\.levels differs"):
        test_blocks.same_plan(plan, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_move_with_their_strides(layout, gpu):
    x = in_layout(torch.randn(3, 4, 5, 6), layout)
    there = moved(x, torch.device("cuda:0"))
    assert (there.stride(), there.storage_offset()) == (x.stride(), x.storage_offset())
    assert torch.equal(there.cpu(), x)


def broken(fault):
    """`dynamic_residual` whose third result is spoilt."""
    count = 0

    def spoilt(*arguments):
        nonlocal count
        count += 1
        return fault(dynamic_residual(*arguments), count)

    return spoilt


def flip(y: Tensor, count: int) -> Tensor:
    if count == 3:
        y[2, 0, 0, 0] += 1e-6
    return y


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (flip, r"calls \[2\] give other bits"),
        (lambda y, count: y.roll(1, 3), "must be its shortcut|errs by"),
        (lambda y, count: torch.where(y.isfinite(), y * 1.02, y), "must be its shortcut|errs by"),
        (lambda y, count: y + y.new_tensor(float("nan")), "NaN|other bits"),
    ],
)
def test_a_composition_that_is_wrong_or_not_the_same_twice_is_found_out(fault, words):
    assert test_composition.check_composition(dynamic_residual, "mask", "tf32", CPU)["calls"] == 3
    with pytest.raises(AssertionError, match=words):
        test_composition.check_composition(broken(fault), "mask", "tf32", CPU)


def test_the_composition_is_compared_under_load():
    """256 images of 64 channels on 32 x 32, 20 calls."""
    sizes = test_composition.BATCH, test_composition.CHANNELS, test_composition.SIDE, test_composition.CALLS
    assert sizes == (256, 64, 32, 20)
