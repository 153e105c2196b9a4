"""The convolution on strips, which Hopper runs, on the CPU twin of Gluon: values and gradients, under two schedules."""

from functools import partialmethod
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="there is no Gluon")

from den_kernels._geometry import Geometry
from den_kernels._triton import convolve, dynamic_conv, strips
from den_kernels._triton.convolve import Epilogue, Following, Pooled
from den_kernels._triton.launch import Launch
from den_kernels.dynamic_conv import dynamic_conv2d_reference
from den_kernels.plan import as_route
from tests import gluon_twin

pytestmark = pytest.mark.skipif(not strips.is_known(), reason="this Triton has another Gluon")


@pytest.fixture(params=gluon_twin.SCHEDULES)
def kernels(request, monkeypatch) -> list[str]:
    """The kernels that run on a Hopper GPU of two multiprocessors."""
    seen: list[str] = []

    def run(launch: Launch, like: torch.Tensor) -> dict:
        seen.append(launch.kernel.fn.__name__)
        gluon_twin.run(launch, schedule=request.param)
        return launch.arguments

    monkeypatch.setattr(convolve, "architecture", lambda device: (90, 2))
    monkeypatch.setattr(Launch, "run", run)
    return seen


def data(B: int, C: int, N: int, size: tuple[int, int], dtype: torch.dtype, kernel: tuple[int, int] = (3, 3)):
    torch.manual_seed(0)
    x = torch.randn(B, C, *size).to(dtype).contiguous(memory_format=torch.channels_last)
    w = (torch.randn(N, C, *kernel) / 8).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, w


CASES = {
    "out, several instances a tile": (((16, 16, 32), ()), (8, 8), (3, 3), 1, torch.bfloat16),
    "in, dilation": (((), (16, 16, 32)), (4, 16), (3, 3), 2, torch.float16),
    "both, more columns of taps": (((64, 64), (16, 16)), (8, 32), (3, 5), 1, torch.bfloat16),
    "wide, three rungs": (((32, 32, 64), ()), (4, 64), (3, 3), 1, torch.bfloat16),
    "a width that is no power of two": (((96, 32), ()), (4, 8), (3, 3), 1, torch.bfloat16),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_data_gradient(kernels, name):
    sides, size, kernel, dilation, dtype = CASES[name]
    groups = len(sides[0] or sides[1])
    C, N = sum(sides[1]) or 16, sum(sides[0]) or 16
    levels = torch.tensor([1, groups, 0, 1, groups])
    x, weight = data(5, C, N, size, dtype, kernel)
    route = as_route(levels, groups, 5)
    pad = kernel[0] // 2 * dilation, kernel[1] // 2 * dilation
    geometry = Geometry((1, 1), pad, (dilation, dilation), 1, *sides)
    y = dynamic_conv.forward(x, weight, None, route, geometry)
    dy = torch.randn_like(y)
    dx, *_ = dynamic_conv.backward(dy, x, weight, route, geometry, (True, False, False))
    assert kernels == ["strip_kernel", "strip_kernel"]
    leaf = x.double().requires_grad_()
    right = dynamic_conv2d_reference(
        leaf, weight.double(), None, route, padding=pad, dilation=dilation, out_groups=sides[0], in_groups=sides[1]
    )
    right.backward(dy.double())
    for got, wanted in ((y, right.detach()), (dx, leaf.grad)):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("pooled", [False, True], ids=["added", "pooled"])
def test_all_that_is_behind_the_sums(kernels, pooled):
    """Hidden channels that nobody wrote (NaN) are not read; out, ReLU and the second output for the right instances."""
    levels, after = torch.tensor([2, 0, 1, 2, 1]), torch.tensor([0, 2, 1, 1, 0]).int()
    hidden, weight = data(5, 32, 64, (8, 16), torch.bfloat16)
    for b, level in enumerate(levels):
        hidden[b, 16 * level :] = torch.nan
    route, geometry = as_route(levels, 2, 5), Geometry((1, 1), (1, 1), (1, 1), 1, (), (16, 16))
    bias, scale, factor, offset = (torch.randn(64) for _ in range(4))
    x = torch.randn(5, 64, 8, 16).bfloat16().contiguous(memory_format=torch.channels_last)
    out = torch.full_like(x, torch.nan) if pooled else x.clone(memory_format=torch.channels_last)
    following = torch.full_like(x, torch.nan)
    epilogue = Epilogue(
        bias, scale, not pooled, Pooled(x, 1) if pooled else None, True, Following(following, factor, offset, after)
    )
    convolve.convolve(hidden, weight, out, route, geometry, skip_empty=True, epilogue=epilogue)
    assert kernels == ["strip_kernel"]
    branch = torch.nn.functional.conv2d(hidden.nan_to_num().double(), weight.double(), padding=1)
    branch = branch * scale[:, None, None] + bias[:, None, None]
    works = (levels > 0)[:, None, None, None]
    wanted = torch.where(works, x.double() + branch, x.double()).relu()
    if not pooled:  # out is left as it is at level 0
        assert torch.equal(out[1], x[1])
        wanted = torch.where(works, wanted, x.double())
    torch.testing.assert_close(out.double(), wanted, rtol=2e-2, atol=3e-2)
    used = after > 0
    kept = torch.where(works, out.double(), x.double().relu())
    second = (kept * factor[:, None, None] + offset[:, None, None]).relu()
    torch.testing.assert_close(following[used].double(), second[used], rtol=2e-2, atol=3e-2)
    assert following[~used].isnan().all()


def test_nothing_selected(kernels):
    x, weight = data(2, 16, 16, (4, 8), torch.bfloat16)
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1, (16,), ())
    y = dynamic_conv.forward(x, weight, None, as_route(torch.tensor([0, 0]), 1, 2), geometry)
    assert kernels == ["strip_kernel"]
    assert torch.equal(y, torch.zeros_like(y))


FAULTS = {
    "a stage is given back before it is read": (
        "        sums = warpgroup_mma_wait(0, deps=made)\n        meet()  # all warps have read the stage\n"
        "        mbarrier.arrive(empty.index(place), count=1)\n",
        "        mbarrier.arrive(empty.index(place), count=1)\n        sums = warpgroup_mma_wait(0, deps=made)\n",
    ),
    "a stage is loaded before it is free": ("mbarrier.wait(empty.index(place), (stage // STAGES & 1) ^ 1)", "pass"),
    "a stage is read before it has landed": ("mbarrier.wait(full.index(place), stage // STAGES & 1)", "pass"),
    "bytes of a row are not waited for": ("(LOADED * 64", "((LOADED - 1) * 64"),
    "a tap too low": ("R - 1 - th) * DIL_H if TRANSPOSED else th * DIL_H", "R - 1 - th) * DIL_H"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    right, wrong = FAULTS[fault]
    read, found = Path.read_text, []

    def read_text(self: Path, *args, **kwargs) -> str:
        text = read(self, *args, **kwargs)
        if self.name in gluon_twin.FILES and right in text:
            found.append(self.name)
        return text.replace(right, wrong)

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(convolve, "architecture", lambda device: (90, 1))
    x, weight = data(3, 64, 16, (8, 16), torch.bfloat16)
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1, (16,), ())
    wanted = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)

    def check() -> None:
        for schedule in gluon_twin.SCHEDULES:
            monkeypatch.setattr(Launch, "run", partialmethod(gluon_twin.run, schedule=schedule))
            y = dynamic_conv.forward(x, weight, None, as_route(torch.ones(3, dtype=torch.int64), 1, 3), geometry)
            torch.testing.assert_close(y.double(), wanted, rtol=2e-2, atol=2e-2)

    with pytest.raises((AssertionError, RuntimeError), match=r"deadlock|Tensor-likes|arrive"):
        check()
    assert len(set(found)) == 1
