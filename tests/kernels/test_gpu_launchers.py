"""What the host does before a GPU kernel runs, without one: which way is taken, that no value is read back, copies.

Launches are caught. On the meta device a tensor has no values, so that a launcher that reads one fails here.
"""

import dataclasses
import re
import warnings
from importlib import import_module
from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from den_kernels import (
    BottleneckWeights,
    DynamicConv2d,
    ResidualWeights,
    _bottleneck_composed,
    _cuda,
    _residual_gpu,
    _triton,
    dynamic_conv2d,
)
from den_kernels._conv_masked import masked_backward
from den_kernels._geometry import Geometry
from den_kernels._triton import strips
from den_kernels.dynamic_conv import compute, dynamic_conv2d_reference
from den_kernels.plan import Route, RoutingPlan, as_route
from den_kernels.testing import make_levels

residual, bottleneck, norms = (
    import_module(f"den_kernels.{name}") for name in ("dynamic_residual", "dynamic_bottleneck", "dynamic_norm")
)
META = torch.device("meta")
GROUPS = (16, 16, 32)


def channels_last(*shape: int, **keywords) -> Tensor:
    return torch.randn(shape, **keywords).contiguous(memory_format=torch.channels_last)


def folded(C: int, C_out: int, stride: int, post: bool = False, device="cpu") -> ResidualWeights:
    conv1 = DynamicConv2d(C, sum(GROUPS), 3, stride, 1, bias=False, out_groups=GROUPS)
    conv2 = nn.Conv2d(sum(GROUPS), C_out, 3, padding=1, bias=False)
    norms = nn.BatchNorm2d(sum(GROUPS) if post else C), nn.BatchNorm2d(C_out if post else sum(GROUPS))
    parts = [part.to(device).eval() for part in (conv1, norms[0], conv2, norms[1])]
    return dataclasses.replace(ResidualWeights.fold(*parts, post_activation=post), direct=None, levels=())


def folded_bottleneck(C: int, C_out: int, stride: int, device="cpu") -> BottleneckWeights:
    M = sum(GROUPS)
    conv1, conv3 = DynamicConv2d(C, M, 1, bias=False, out_groups=GROUPS), nn.Conv2d(M, C_out, 1, bias=False)
    conv2 = nn.Conv2d(M, M, 3, stride, 1, bias=False)
    norms = nn.BatchNorm2d(C), nn.BatchNorm2d(M), nn.BatchNorm2d(M)
    parts = [part.to(device).eval() for part in (conv1, norms[0], conv2, norms[1], conv3, norms[2])]
    return dataclasses.replace(BottleneckWeights.fold(*parts), direct=None)


@pytest.fixture
def launches(monkeypatch) -> list:
    """Triton launches, which do not run."""
    pytest.importorskip("triton", reason="triton is not installed")
    from den_kernels._triton.launch import Launch

    caught: list = []

    def run(self, like):
        caught.append(self)
        return self.arguments

    monkeypatch.setattr(Launch, "run", run)
    return caught


def meta_route(kind: str, batch: int) -> Route:
    if kind == "mask":
        return RoutingPlan.from_masks(torch.empty(batch, 1, 3, dtype=torch.bool, device=META))[0]
    return RoutingPlan.from_levels(torch.empty(batch, 1, dtype=torch.int64, device=META), 3)[0]


@pytest.mark.parametrize("kind", ["levels", "mask"])
@pytest.mark.parametrize("sides", [(GROUPS, ()), ((), GROUPS), (GROUPS, GROUPS)], ids=["out", "in", "both"])
def test_convolutions_read_nothing_back(launches, sides, kind):
    from den_kernels._triton import dynamic_conv as kernels

    x, weight = torch.empty(5, 64, 8, 8, device=META), torch.empty(64, 64, 3, 3, device=META)
    route, geometry = meta_route(kind, 5), Geometry((1, 1), (1, 1), (1, 1), 1, *sides)
    y = kernels.forward(x, weight, torch.empty(64, device=META), route, geometry)
    gradients = kernels.backward(y, x, weight, route, geometry, (True, True, True))
    assert [t.shape for t in (y, *gradients)] == [y.shape, x.shape, weight.shape, (64,)]
    assert [launch.kernel.fn.__name__ for launch in launches] == [
        "convolve_kernel", "convolve_kernel", "weight_gradient_kernel",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["levels", "mask"])
def test_norms_and_blocks_read_nothing_back(launches, kind):
    from den_kernels._triton import norm
    from den_kernels._triton.residual import add_branch

    x, route, vector = torch.empty(5, 64, 8, 8, device=META), meta_route(kind, 5), torch.empty(64, device=META)
    _, statistics = norm.forward(x, route.selection(), None, vector, vector, GROUPS, 1e-5, True)
    norm.backward(x, x, route.selection(), statistics, vector, vector, GROUPS, 1e-5, True, True, True, True)
    assert len(launches) == 5
    add_branch(x, x, route, folded(64, 64, 1, device=META))
    before, first, second = launches[5:]
    assert before.kernel.fn.__name__ == "activate_kernel"
    assert first.arguments["source"] is before.arguments["y"]
    assert first.arguments["RELU"]
    assert second.arguments["ADD"]
    assert second.arguments["SKIP_EMPTY"]
    assert not second.arguments["RELU"]
    add_branch(x, x, route, folded(64, 64, 1, post=True, device=META))
    assert [launch.kernel.fn.__name__ for launch in launches[8:]] == ["convolve_kernel"] * 2
    assert launches[9].arguments["RELU"]


@pytest.mark.parametrize("kind", ["levels", "mask"])
def test_bottlenecks_read_nothing_back(launches, kind, monkeypatch):
    monkeypatch.setattr(_triton, "runs_on", lambda device: True)
    x, route = torch.empty(5, 64, 8, 8, device=META), meta_route(kind, 5)
    for stride in (1, 2):
        y = _bottleneck_composed.run(x, route, folded_bottleneck(64, 96, stride, META), None, False)
        assert y.shape == (5, 96, 8 // stride, 8 // stride)
        names = [launch.kernel.fn.__name__ for launch in launches]
        assert names == ["activate_kernel", *["convolve_kernel"] * 3]
        assert launches[1].arguments["source"] is launches[0].arguments["y"]
        launches.clear()


@pytest.mark.parametrize(("allowed", "precision"), [(True, "tf32"), (False, "ieee")])
def test_tf32_follows_the_flag_of_torch(launches, monkeypatch, allowed, precision):
    from den_kernels._triton import dynamic_conv as kernels

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    x, weight = torch.empty(2, 64, 4, 4, device=META), torch.empty(64, 64, 3, 3, device=META)
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1, GROUPS, ())
    y = kernels.forward(x, weight, None, meta_route("levels", 2), geometry)
    kernels.backward(y, x, weight, meta_route("levels", 2), geometry, (True, True, False))
    assert [launch.arguments["PRECISION"] for launch in launches] == [precision] * 3
    kernels.forward(x.bfloat16(), weight.bfloat16(), None, meta_route("levels", 2), geometry)
    assert launches[3].arguments["PRECISION"] == "tf32"  # said of float32 alone


@pytest.fixture
def settings_of_float32():
    """torch.backends, whose settings for float32 are as before afterwards."""
    backends = torch.backends
    places = (backends, backends.cudnn, backends.cudnn.conv)
    before, allowed = [place.fp32_precision for place in places], backends.cudnn.allow_tf32
    yield backends
    for place, value in zip(places, before, strict=True):
        place.fp32_precision = value
    backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize(
    ("changes", "precision"),
    [
        ([("cudnn.conv", "ieee")], "ieee"),
        ([("cudnn.conv", "none"), ("", "ieee")], "ieee"),
        ([("cudnn.conv", "none"), ("", "tf32")], "tf32"),
        ([("cudnn.conv", "none"), ("cudnn", "ieee")], "ieee"),
        ([("cudnn.conv", "none"), ("", "bf16")], "ieee"),
    ],
    ids=["conv", "all-ieee", "all-tf32", "cudnn", "all-bf16"],
)
def test_the_new_settings_for_float32_are_followed(launches, settings_of_float32, monkeypatch, changes, precision):
    """By Triton and the fused kernel; after most of them, reading `allow_tf32` is an error."""
    from den_kernels._triton import dynamic_conv as kernels

    for place, value in changes:
        (attrgetter(place)(torch.backends) if place else torch.backends).fp32_precision = value
    x, weight = torch.empty(2, 64, 4, 4, device=META), torch.empty(64, 64, 3, 3, device=META)
    kernels.forward(x, weight, None, meta_route("levels", 2), Geometry((1, 1), (1, 1), (1, 1), 1, GROUPS, ()))
    assert launches[0].arguments["PRECISION"] == precision
    problem = good_problem()
    wide = {name: getattr(problem["weights"], name).float() for name in ("conv1", "conv2")}
    problem = replaced(problem | {"x": problem["x"].float()}, **wide)
    properties = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=227 << 10)
    monkeypatch.setattr(_cuda, "runs_on", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert (_cuda.layout_of(**problem) is not None) == (precision == "tf32")


@pytest.mark.parametrize("kind", ["aligned", "misaligned", "contiguous"])
def test_maps_are_copied_once_where_loads_would_be_narrow(launches, kind):
    from den_kernels._triton.convolve import convolve

    buffer = torch.randn(2 * 64 * 16 + 1)[int(kind == "misaligned") :][: 2 * 64 * 16]
    x = buffer.view(2, 64, 4, 4) if kind == "contiguous" else buffer.view(2, 4, 4, 64).permute(0, 3, 1, 2)
    assert (x.data_ptr() % 16 == 0) == (kind != "misaligned")
    weight, out = channels_last(64, 64, 3, 3), torch.empty_like(x, memory_format=torch.channels_last)
    route, geometry = as_route(torch.tensor([1, 3]), 3, 2), Geometry((1, 1), (1, 1), (1, 1), 1, GROUPS, ())
    convolve(x, weight, out, route, geometry)
    source = launches[0].arguments["source"]
    assert (source.data_ptr() == x.data_ptr()) == (kind == "aligned")
    assert source.data_ptr() % 16 == 0
    assert source.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(source, x)
    assert launches[0].arguments["weight"] is weight


class OnOldGpu(Tensor):
    """CPU memory that says it lies on a GPU."""

    is_cpu = property(lambda self: False)
    device = property(lambda self: torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("capability", "triton", "reason"),
    [((7, 5), True, r"compute capability 7\.5"), ((9, 0), False, "triton is not installed")],
)
def test_an_old_gpu_or_no_triton_give_right_values_and_one_warning(monkeypatch, capability, triton, reason):
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(_triton, "HAS_TRITON", triton)
    monkeypatch.setattr(_triton, "_said", set())
    levels = torch.tensor([2, 0, 3, 1])
    x, weight = channels_last(4, 64, 6, 6), channels_last(64, 64, 3, 3)
    route, geometry = as_route(levels, 3, 4), Geometry((1, 1), (1, 1), (1, 1), 1, GROUPS, ())
    there, weights, deep = x.as_subclass(OnOldGpu), folded(64, 64, 1), folded_bottleneck(64, 96, 2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        y = compute(there, weight, None, route, geometry)
        block = residual._OP.functional(there, route, weights)
        in_place = there.clone()
        residual._OP.over(in_place, route, weights)
        composed = bottleneck._OP.functional(there, route, deep)
        gradients = masked_backward(y, there, weight, route, geometry, (True, True, False))
    assert len(said) == 1
    assert said[0].category is UserWarning
    assert re.search(reason, str(said[0].message))
    right = dynamic_conv2d_reference(x, weight, None, route, padding=1, out_groups=GROUPS)
    torch.testing.assert_close(y.as_subclass(Tensor), right, rtol=1e-4, atol=1e-4)
    right = residual.dynamic_residual_reference(x, route, weights)
    for got in (block, in_place):
        torch.testing.assert_close(got.as_subclass(Tensor), right, rtol=1e-4, atol=1e-4)
    right = bottleneck.dynamic_bottleneck_reference(x, route, deep)
    torch.testing.assert_close(composed.as_subclass(Tensor), right, rtol=1e-4, atol=1e-4)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    dynamic_conv2d(*leaves, None, levels, padding=1, out_groups=GROUPS).backward(y.as_subclass(Tensor))
    for got, leaf in zip(gradients, leaves, strict=False):
        torch.testing.assert_close(got.as_subclass(Tensor), leaf.grad, rtol=1e-4, atol=1e-3)
    assert not norms._has_kernels(there)
    assert capability >= (8, 0) or not _cuda.plans_levels(there.device, 3)


def good_problem() -> dict:
    weights = folded(64, 64, 1)
    weights = dataclasses.replace(
        weights,
        conv1=weights.conv1.bfloat16().contiguous(memory_format=torch.channels_last),
        conv2=weights.conv2.bfloat16().contiguous(memory_format=torch.channels_last),
    )
    route = as_route(make_levels("uniform", 66, 3), 3, 66)
    return {"x": channels_last(66, 64, 12, 12, dtype=torch.bfloat16), "route": route, "weights": weights}


def replaced(problem: dict, **changes) -> dict:
    return problem | {"weights": dataclasses.replace(problem["weights"], **changes)}


NOT_TAKEN = {
    "a mask": lambda p: p | {"route": as_route(torch.ones(66, 3, dtype=torch.bool), 3, 66)},
    "fewer instances than half of the multiprocessors": lambda p: (
        p | {"x": p["x"][:65], "route": as_route(make_levels("uniform", 65, 3), 3, 65)}
    ),
    "float32 without TF32": lambda p: p | {"x": p["x"].float()},
    "float64": lambda p: p | {"x": p["x"].double()},
    "another kernel": lambda p: replaced(p, conv1=p["weights"].conv1[:, :, 1:2, 1:2]),
    "not channels-last": lambda p: p | {"x": p["x"].contiguous()},
    "weights not channels-last": lambda p: replaced(p, conv2=p["weights"].conv2.contiguous()),
    "misaligned": lambda p: (
        p | {"x": torch.empty(66 * 9216 + 1, dtype=torch.bfloat16)[1:].view(66, 12, 12, 64).permute(0, 3, 1, 2)}
    ),
    "groups of 24 channels": lambda p: replaced(p, groups=(24, 40)),
    "stride 3": lambda p: replaced(p, stride=3),
    "too few pixels for a read of the weights": lambda p: p | {"x": p["x"][:, :, :6, :6].clone()},
    "one that runs on strips": lambda p: p | {"x": channels_last(66, 64, 12, 16, dtype=torch.bfloat16)},
}


@pytest.mark.parametrize("case", ["taken", "post-activation", "more instances than multiprocessors", *NOT_TAKEN])
def test_which_blocks_the_fused_kernel_takes(case, monkeypatch):
    problem = good_problem()
    if case == "post-activation":
        problem = replaced(problem, scale1=None, shift1=None, relu=True)
    if case in NOT_TAKEN:
        problem = NOT_TAKEN[case](problem)
    chip = {"multi_processor_count": 132, "shared_memory_per_block_optin": 227 << 10, "major": 9, "minor": 0}
    monkeypatch.setattr(_cuda, "runs_on", lambda device: True)
    monkeypatch.setattr(_triton, "HAS_TRITON", True)
    monkeypatch.setattr(strips, "is_known", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**chip))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert (_cuda.choose_fused(**problem) is None) == (case in NOT_TAKEN)


@pytest.mark.parametrize("post", [False, True], ids=["pre-activation", "post-activation"])
@pytest.mark.parametrize(
    ("C_out", "stride", "given"), [(64, 1, False), (64, 2, False), (64, 1, True), (64, 2, True)], ids=str
)
def test_the_op_goes_through_the_fused_kernel_where_that_takes_the_block(C_out, stride, given, post, monkeypatch):
    """The kernel's place is taken by its definition (csrc/cuda_ops.h): level 0 untouched where out holds a shortcut."""
    calls = []

    def fused(x, out, route, weights, layout, *, holds_shortcut):
        calls.append(holds_shortcut)
        whole = residual.dynamic_residual_reference(x, route, weights, out if holds_shortcut else None)
        used = (route.levels > 0)[:, None, None, None] | (not holds_shortcut)
        out.copy_(torch.where(used, whole, out))

    weights, levels = folded(64, C_out, stride, post), torch.tensor([2, 0, 3, 1])
    x = channels_last(4, 64, 6, 6).relu_()
    side = -(-6 // stride)
    shortcut = channels_last(4, C_out, side, side) if given else None
    expected = residual.dynamic_residual(x, levels, weights, shortcut)
    monkeypatch.setattr(_cuda, "choose_fused", lambda *_: "a layout")
    monkeypatch.setattr(_cuda, "fused_residual", fused)
    route = as_route(levels, 3, 4)
    got = _residual_gpu.run(x, route, weights, shortcut, False)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert calls == [given]
    if stride == 1 and not given:
        own = x.clone(memory_format=torch.channels_last)
        assert _residual_gpu.run(own, route, weights, None, True) is own
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(own[1], x[1])
        assert calls == [False, True]
