"""Batch norm in Triton: the public function on the kernels, against the reference in float64."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from den_kernels import dynamic_batch_norm, dynamic_norm
from den_kernels._triton import norm as kernels
from den_kernels.dynamic_norm import dynamic_batch_norm_reference
from den_kernels.testing import assert_as_accurate, channel_mask, make_levels, make_mask, poison_unread


class OnKernels(torch.autograd.Function):
    """The registered op as it is on a GPU, on any device."""

    forward = staticmethod(kernels.forward)
    setup_context = staticmethod(dynamic_norm._save)
    backward = staticmethod(dynamic_norm._gradients)


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_norm, "_has_kernels", lambda x: True)
    monkeypatch.setattr(dynamic_norm, "is_ordinary", lambda *_: False)  # not the C++ that such tensors have
    monkeypatch.setattr(dynamic_norm, "runs_eagerly", lambda *_: False)
    monkeypatch.setattr(dynamic_norm, "_norm_forward", OnKernels.apply)
    monkeypatch.setattr(dynamic_norm, "_norm_backward", kernels.backward)


class Case(NamedTuple):
    sizes: tuple[int, ...] = (16, 16, 32)
    selection: str = "uniform"  # one of LEVEL_KINDS, or "mask"
    batch: int = 6
    size: tuple[int, int] = (5, 7)
    dtype: torch.dtype = torch.float32
    training: bool = True
    relu: bool = True
    affine: bool = True
    tracked: bool = True

    def selected(self) -> Tensor:
        groups = len(self.sizes)
        if self.selection == "mask":
            return make_mask(self.batch, groups)
        return make_levels(self.selection, self.batch, groups)

    def maps(self) -> tuple[Tensor, Tensor]:
        """x and dy, NaN where nothing may be read."""
        x, dy = torch.randn(2, self.batch, sum(self.sizes), *self.size).to(self.dtype).unbind()
        return tuple(poison_unread(map, self.selected(), self.sizes) for map in (x * 2 + 3, dy))


def vectors(case: Case, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Weight, bias, running mean and variance; all differ between channels."""
    C = sum(case.sizes)
    made = [torch.linspace(low, high, C, dtype=dtype) for low, high in ((0.5, 2), (-1, 1), (-0.2, 0.3), (0.7, 1.6))]
    wanted = [case.affine] * 2 + [case.tracked] * 2
    return tuple(vector if keep else None for vector, keep in zip(made, wanted, strict=True))


def results(op: Any, case: Case, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output, running statistics and gradients of one call, by name."""
    weight, bias, *running = vectors(case, torch.promote_types(x.dtype, torch.float32))
    leaves = {"dx": x, "dweight": weight, "dbias": bias}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    y = op(
        leaves["dx"], case.selected(), leaves.get("dweight"), leaves.get("dbias"), *running,
        groups=case.sizes, training=case.training, relu=case.relu,
    )  # fmt: skip
    gradients = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True, materialize_grads=True)
    made = {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}
    return made | (dict(zip(("mean", "var"), running, strict=True)) if case.tracked else {})


def term_sizes(case: Case, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The sizes of the terms that are added up for each gradient; of dx, per channel, the largest of them."""
    used = channel_mask(case.selected(), case.sizes)[:, :, None, None].expand_as(x)
    weight, _, mean, var = vectors(case, torch.float64)
    x, dy = x.double().where(used, 0), dy.double().where(used, 0).abs()
    if case.training or mean is None:
        count = used.sum((0, 2, 3)).clamp(min=1)
        mean = x.sum((0, 2, 3)) / count
        var = (x - mean[:, None, None]).where(used, 0).square().sum((0, 2, 3)) / count
    inverse = (var + 1e-5).rsqrt()
    xhat = (x - mean[:, None, None]).where(used, 0) * inverse[:, None, None]
    largest = dy.amax((0, 2, 3)) * inverse * (1 if weight is None else weight)
    dx = largest[:, None, None].expand_as(x).where(used, 0)
    return {"dx": dx, "dweight": (dy * xhat.abs()).sum((0, 2, 3)), "dbias": dy.sum((0, 2, 3))}


CASES = {
    "levels, tiles of one group": Case(),
    "levels, tiles of several groups": Case(dtype=torch.bfloat16),
    "levels, groups that end anywhere": Case((5, 11, 8)),
    "levels in half precision": Case((16, 16, 32), dtype=torch.float16, size=(3, 3)),
    "levels and running statistics": Case(training=False, dtype=torch.bfloat16),
    "levels without statistics kept": Case(training=False, tracked=False, affine=False),
    "levels, one instance alone": Case(selection="last only", size=(3, 3)),
    "levels, a level that nobody chose": Case(selection="no middle", relu=False),
    "mask": Case(selection="mask", relu=False),
    "mask, groups that end anywhere": Case((5, 11, 8), "mask", dtype=torch.bfloat16),
    "mask, groups of a channel or none": Case((1, 0, 3, 1), "mask", training=False),
    "one group of odd width": Case((24,), "mask"),
    "many tiles": Case((16, 48), batch=3, size=(20, 27)),
    "many tiles, the last one short": Case((32, 32), "mask", 3, (13, 27), torch.bfloat16, affine=False),
    "one pixel": Case((8, 8), "top", 5, (1, 1)),
    "one instance, one value in a tile": Case((32, 32), "top", 1, (1, 129)),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_reference(name: str) -> None:
    case = CASES[name]
    x, dy = case.maps()
    got = results(dynamic_batch_norm, case, x, dy)
    exact = results(dynamic_batch_norm_reference, case, x.double(), dy.double())
    peer = results(dynamic_batch_norm_reference, case, x.float(), dy.float())
    used = channel_mask(case.selected(), case.sizes)[:, :, None, None].expand_as(x)
    assert bool((got["y"][~used] == 0).all() and (got["dx"][~used] == 0).all())
    scales = term_sizes(case, x, dy)
    for key in got:
        # Of a few elements PyTorch's largest error is a matter of luck, hence more than twice.
        assert_as_accurate(got[key], peer[key].to(got[key].dtype), exact[key], scales.get(key), factor=4.0)


@pytest.mark.parametrize("batch", [0, 3])
def test_channels_that_nobody_uses_keep_their_running_statistics(batch: int) -> None:
    x = torch.full((batch, 16, 4, 4), float("nan"), requires_grad=True)
    weight, bias = torch.ones(16, requires_grad=True), torch.ones(16, requires_grad=True)
    mean, var = torch.full((16,), 0.25), torch.ones(16)
    levels = torch.zeros(batch, dtype=torch.int64)
    y = dynamic_batch_norm(x, levels, weight, bias, mean, var, groups=(8, 8), training=True)
    y.sum().backward()
    assert y.shape == x.shape
    assert not y.any()
    assert all(not leaf.grad.any() for leaf in (x, weight, bias))
    assert mean.eq(0.25).all()
    assert var.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_mean_does_not_cancel(dtype: torch.dtype) -> None:
    x = (torch.randn(8, 16, 20, 20) * 8 + 3000).to(dtype)
    mean, var = torch.zeros(16), torch.zeros(16)
    dynamic_batch_norm(x, torch.full((8,), 1), None, None, mean, var, groups=(16,), training=True, momentum=1.0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)


def test_nan_in_a_used_channel_passes_through_like_in_batch_norm() -> None:
    x = torch.randn(3, 16, 4, 4)
    x[0, 5, 0, 0] = float("nan")
    y = dynamic_batch_norm(x, torch.tensor([2, 3, 1]), *[None] * 4, groups=(4, 4, 8), training=True, relu=True)
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[:2, 5] = True
    assert torch.equal(y.isnan(), expected)


def test_gradients_not_needed_are_not_computed() -> None:
    case = Case()
    x, dy = case.maps()
    weight, bias, mean, var = vectors(case, torch.float32)
    selection = channel_mask(case.selected(), (1, 1, 1))
    given = (dy, x, selection, torch.stack([mean, var, torch.full_like(mean, 32)]), weight, bias, case.sizes)
    for training in (True, False):
        dx, sums = kernels.backward(*given, 1e-5, True, training, True, True)
        alone = kernels.backward(*given, 1e-5, True, training, True, False)
        assert torch.equal(alone[0], dx)
        assert alone[1].numel() == 0
        alone = kernels.backward(*given, 1e-5, True, training, False, True)
        assert alone[0].numel() == 0
        assert torch.equal(alone[1], sums)


def test_exactly_what_the_instances_use_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    load, read = InterpreterBuilder.create_masked_load, []

    def count(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        if pointers.get_element_ty().name == "bf16":  # of the maps; all else is float32
            read.append(int(mask.data.sum()))
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", count)
    case = Case((32, 8, 24), batch=9, dtype=torch.bfloat16)
    x, dy = case.maps()
    used = int(channel_mask(case.selected(), case.sizes).sum()) * x[0, 0].numel()
    y = dynamic_batch_norm(x.requires_grad_(), case.selected(), *[None] * 4, groups=case.sizes, training=True)
    assert sum(read) == 2 * used  # statistics, apply
    y.backward(dy)
    assert sum(read) == 6 * used  # reduce and gradient, x and dy each
    assert min(read) > 0  # a tile that is not used costs no load


TILES = {  # channel groups, pixels, bytes of an element, bytes of a tile: rows, columns, warps, one group in a tile
    "a tile holds 128 bytes of a pixel": ((64, 64, 128), 1024, 2, 16384, (128, 64, 4, True)),
    "float32": ((64, 64, 128), 1024, 4, 16384, (128, 32, 4, True)),
    "a tile stays within a group": ((32, 32, 64), 1024, 2, 16384, (256, 32, 4, True)),
    "but not under 64 bytes": ((16, 16, 32), 1024, 2, 16384, (256, 32, 4, False)),
    "only where groups begin counts": ((64, 24), 1024, 2, 16384, (128, 64, 4, True)),
    "few channels": ((5,), 1024, 4, 8192, (256, 8, 4, True)),
    "a small map": ((128, 128, 256), 16, 2, 16384, (16, 64, 2, True)),
    "one pixel": ((128, 128, 256), 1, 2, 16384, (4, 64, 1, True)),
}


@pytest.mark.parametrize("name", TILES)
def test_tiles_follow_the_groups(name: str) -> None:
    *case, expected = TILES[name]
    assert kernels.choose_tile(*case) == expected


def test_shares_fill_half_of_the_warps() -> None:
    tile = kernels.choose_tile((64,), 1024, 2, 8192)
    assert kernels.choose_shares(64, 4096, tile, 132) == 132 * 8
    assert kernels.choose_shares(256, 4096, tile, 132) == 132 * 2
    assert kernels.choose_shares(256, 100, tile, 132) == 100
    assert kernels.choose_shares(2**16, 4096, tile, 2) == 1
