"""How often Triton compiles the kernels: once for each shape of a launch, whatever the batch, wherever its plan lies.

Triton keeps a compiled kernel under a key: the constants, the types, which integers are 1 or multiples of 16, and which
addresses are multiples of 16. A stand-in for the driver lets the launcher make its keys here; nothing is compiled.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from den_kernels import RoutingPlan
from den_kernels._geometry import Geometry
from den_kernels.plan import Route

triton = pytest.importorskip("triton", reason="triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402

from den_kernels._triton import dynamic_conv, norm  # noqa: E402
from den_kernels._triton.launch import Launch  # noqa: E402
from den_kernels._triton.residual import add_branch  # noqa: E402
from tests.kernels.test_gpu_launchers import folded  # noqa: E402

GROUPS = (16, 16, 32)
BATCHES = (1, 2, 7, 16, 33, 48)


class Driver:
    """As much of a driver as a launcher asks before it compiles."""

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    is_active = staticmethod(lambda: True)


@pytest.fixture
def keys(monkeypatch) -> dict[str, set]:
    """Name of a kernel -> the keys under which it would be compiled."""
    found: dict[str, set] = {}

    def note(*, key: str, repr: str, fn, **_) -> bool:
        found.setdefault(fn.name.rsplit(".", 1)[-1], set()).add(key)
        return True  # somebody else compiles it

    def run(self: Launch, like: Tensor) -> dict:
        self.kernel.warmup(**self.arguments, grid=(self.programs,))
        return self.arguments

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    monkeypatch.setattr(Launch, "run", run)
    return found


def maps(batch: int, channels: int = 64, side: int = 6) -> Tensor:
    return torch.zeros(batch, channels, side, side).contiguous(memory_format=torch.channels_last)


def routes(batch: int, kind: str) -> list[Route]:
    """Of a plan of three blocks: rows of one tensor, so that most begin between 16-byte boundaries."""
    if kind == "levels":
        plan = RoutingPlan.from_levels(torch.randint(0, 4, (batch, 3)), 3)
    else:
        plan = RoutingPlan.from_masks(torch.rand(batch, 3, 3) < 0.5)
    return [plan[i] for i in range(3)]


def convolution(x: Tensor, route: Route, sides: tuple) -> None:
    weight, geometry = maps(64, 64, 3), Geometry((1, 1), (1, 1), (1, 1), 1, *sides)
    y = dynamic_conv.forward(x, weight, torch.zeros(64), route, geometry)
    dynamic_conv.backward(y, x, weight, route, geometry, (True, True, False))


def block(x: Tensor, route: Route) -> None:
    add_branch(x, x, route, folded(64, 64, 1))


def batch_norm(x: Tensor, route: Route) -> None:
    vector = torch.ones(64)
    y, statistics = norm.forward(x, route.selection(), None, vector, vector, GROUPS, 1e-5, True)
    norm.backward(y, x, route.selection(), statistics, vector, vector, GROUPS, 1e-5, True, True, True, True)


OPS: dict[str, tuple[Callable[[Tensor, Route], None], dict[str, int]]] = {
    "out": (lambda x, r: convolution(x, r, (GROUPS, ())), {"convolve_kernel": 2, "weight_gradient_kernel": 1}),
    "in": (lambda x, r: convolution(x, r, ((), GROUPS)), {"convolve_kernel": 2, "weight_gradient_kernel": 1}),
    "both": (lambda x, r: convolution(x, r, (GROUPS, GROUPS)), {"convolve_kernel": 2, "weight_gradient_kernel": 1}),
    "norm": (batch_norm, dict.fromkeys(
        ("statistics_kernel", "fold_kernel", "apply_kernel", "reduce_kernel", "gradient_kernel"), 1)),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["levels", "mask"])
@pytest.mark.parametrize("op", OPS)
def test_one_compilation_for_a_shape_whatever_the_batch(keys, op, kind):
    call, expected = OPS[op]
    for batch in BATCHES:
        for route in routes(batch, kind):
            call(maps(batch), route)
    assert {name: len(found) for name, found in keys.items()} == expected


@pytest.mark.parametrize("kind", ["levels", "mask"])
def test_blocks_of_every_batch_share_their_two_convolutions(keys, kind):
    for batch in BATCHES:
        for route in routes(batch, kind):
            block(maps(batch), route)
    assert len(keys["convolve_kernel"]) == 2


def test_a_batch_of_one_may_have_any_stride_between_its_instances(keys):
    """Nothing is read by it, but it must not count as another shape."""
    x = maps(1)
    for stride in (x.stride(0), 1, 7):
        own = x.as_strided(x.shape, (stride, *x.stride()[1:]))
        for route in routes(1, "levels"):
            convolution(own, route, (GROUPS, ()))
    assert {name: len(found) for name, found in keys.items()} == {"convolve_kernel": 2, "weight_gradient_kernel": 1}


def test_another_map_is_another_shape(keys):
    """The keys are not all the same."""
    for side in (6, 16):
        convolution(maps(2, 64, side), routes(2, "levels")[0], (GROUPS, ()))
    assert len(keys["convolve_kernel"]) == 4
