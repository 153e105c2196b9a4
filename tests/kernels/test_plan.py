"""Routing plans: three implementations that agree exactly, and what a plan promises to those who use it."""

import dataclasses
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from den_kernels import Route, RoutingPlan
from den_kernels.plan import as_route, route_for
from den_kernels.plan_sort import (
    plan_levels,
    plan_levels_reference,
    plan_levels_torch,
    plan_masks,
    plan_masks_reference,
    plan_masks_torch,
)
from den_kernels.rows import read_route

sizes = st.tuples(st.sampled_from([0, 1, 2, 7, 33]), st.sampled_from([0, 1, 3, 17]), st.sampled_from([1, 2, 4, 63, 70]))
fills = st.sampled_from(["random", "none", "all", "few"])


def make_levels(B: int, N: int, G: int, fill: str, seed: int) -> Tensor:
    random = torch.randint(0, G + 1, (B, N), generator=torch.Generator().manual_seed(seed))
    return {"random": random, "none": random * 0, "all": random * 0 + G, "few": random % 2}[fill]


def make_masks(B: int, N: int, G: int, fill: str, seed: int) -> Tensor:
    random = torch.rand(B, N, G, generator=torch.Generator().manual_seed(seed)) < 0.5
    few = random & (torch.arange(G) < 2)
    return {"random": random, "none": random & False, "all": random | True, "few": few}[fill]


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype == torch.int32
        assert a.is_contiguous()
        assert torch.equal(a, b)


@given(size=sizes, fill=fills, seed=st.integers(0, 99), dtype=st.sampled_from([torch.int32, torch.int64, torch.uint8]))
def test_levels_agree_with_the_reference(size, fill, seed, dtype):
    levels = make_levels(*size, fill, seed).to(dtype)
    expected = plan_levels_reference(levels, size[2])
    assert_same(plan_levels(levels, size[2]), expected)
    assert_same(plan_levels_torch(levels, size[2]), expected)


@given(size=sizes, fill=fills, seed=st.integers(0, 99))
def test_masks_agree_with_the_reference(size, fill, seed):
    masks = make_masks(*size, fill, seed)
    expected = plan_masks_reference(masks)
    assert_same(plan_masks(masks), expected)
    assert_same(plan_masks_torch(masks), expected)


@pytest.mark.parametrize("B", [4_097, 65_536])
def test_levels_of_a_batch_large_enough_for_threads(B):
    levels = torch.randint(0, 5, (B, 35))
    rows, order, offsets = plan_levels(levels, 4)
    assert_same((rows, order, offsets), plan_levels_torch(levels, 4))
    assert torch.equal(rows.gather(1, order.long()), rows.sort(1, descending=True).values)


def test_masks_of_thousands_of_groups():
    masks = torch.rand(50, 2, 3000) < 0.5
    masks[10:20] = masks[:10]
    assert_same(plan_masks(masks), plan_masks_reference(masks))
    assert_same(plan_masks_torch(masks), plan_masks_reference(masks))


def test_levels_worked_example():
    route = RoutingPlan.from_levels(torch.tensor([[1], [0], [2], [1], [2]]))[0]
    assert route.groups == 2
    assert route.order.tolist() == [2, 4, 0, 3, 1]
    assert route.offsets.tolist() == [0, 2, 4, 5]


def test_masks_worked_example():
    rows = [[0, 1, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0]]
    route = RoutingPlan.from_masks(torch.tensor(rows, dtype=torch.bool)[:, None])[0]
    assert route.levels.tolist() == [1, 2, 1, 0, 1, 2]
    assert route.order.tolist() == [1, 5, 4, 0, 2, 3]
    assert route.offsets.tolist() == [0, 2, 3, 5, 6, 6, 6]


@given(size=sizes, fill=fills, seed=st.integers(0, 99), of_masks=st.booleans())
def test_segments_hold_every_instance_once_with_its_selection(size, fill, seed, of_masks):
    B, N, G = size
    make = make_masks if of_masks else make_levels
    given_ = make(B, N, G, fill, seed)
    plan = RoutingPlan.from_masks(given_) if of_masks else RoutingPlan.from_levels(given_, G)
    assert len(plan) == N
    assert plan.batch_size == B
    for i in range(N):
        route = plan[i]
        expected = given_[:, i] if of_masks else torch.arange(G) < given_[:, i, None]
        assert torch.equal(route.selection(), expected)
        bounds = route.offsets.tolist()
        segments = [route.order[a:b].tolist() for a, b in pairwise(bounds)]
        assert sorted(b for segment in segments for b in segment) == list(range(B))
        for segment in segments:
            assert all(torch.equal(expected[b], expected[segment[0]]) for b in segment)


@given(size=sizes, fill=fills, seed=st.integers(0, 99), of_masks=st.booleans())
def test_active_is_a_route_of_one_group(size, fill, seed, of_masks):
    B, _, G = size
    given_ = (make_masks if of_masks else make_levels)(B, 1, G, fill, seed)
    route = (RoutingPlan.from_masks(given_) if of_masks else RoutingPlan.from_levels(given_, G))[0]
    active, used = route.active(), route.levels > 0
    assert (active.groups, active.mask) == (1, None)
    assert torch.equal(active.levels, used.int())
    assert active.offsets.tolist() == [0, int(used.sum()), B]
    assert used[active.order.long()].tolist() == sorted(used.tolist(), reverse=True)
    assert torch.equal(active.selection(), used[:, None])


@given(size=sizes, fill=fills, seed=st.integers(0, 99), of_masks=st.booleans())
def test_a_plan_gives_its_routes_in_turn_and_says_which_blocks_no_instance_uses(size, fill, seed, of_masks):
    B, N, G = size
    given_ = (make_masks if of_masks else make_levels)(B, N, G, fill, seed)
    given_[:, :1] = 0
    plan = RoutingPlan.from_masks(given_) if of_masks else RoutingPlan.from_levels(given_, G)
    expected = [not bool(plan[n].selection().any()) for n in range(N)] if B else [False] * N
    assert plan.idle() == expected
    assert [(route.levels.tolist(), route.order.tolist(), route.offsets.tolist()) for route in plan] == [
        (plan[n].levels.tolist(), plan[n].order.tolist(), plan[n].offsets.tolist()) for n in range(N)
    ]
    assert all(torch.equal(route.selection(), plan[n].selection()) for n, route in enumerate(plan))
    assert plan.to("meta").idle() == [False] * N


def test_routes_are_contiguous_rows_of_the_plan():
    for plan in (
        RoutingPlan.from_levels(torch.randint(0, 4, (5, 3)), 3),
        RoutingPlan.from_masks(torch.ones(5, 3, 2) > 0),
    ):
        for route in (plan[1], plan[-1], plan.to("cpu")[2]):
            tensors = [route.levels, route.order, route.offsets] + ([route.mask] if route.mask is not None else [])
            assert all(tensor.is_contiguous() for tensor in tensors)
        assert plan[-1].order.data_ptr() == plan[2].order.data_ptr()
        with pytest.raises(IndexError, match=r"block must be in 0\.\.2, got 3"):
            plan[3]


def test_without_groups_the_highest_level_counts():
    assert RoutingPlan.from_levels(torch.tensor([[1, 3], [0, 2]])).groups == 3
    assert RoutingPlan.from_levels(torch.zeros(4, 2, dtype=torch.int64)).groups == 1
    assert RoutingPlan.from_levels(torch.zeros(0, 2, dtype=torch.int64)).groups == 1


@pytest.mark.parametrize("bad", [7, -1, 2**32 + 1], ids=["above", "negative", "one-when-cut-to-32-bits"])
@pytest.mark.parametrize("compiled", [True, False], ids=["extension", "no-extension"])
def test_a_level_out_of_range_is_named(bad, compiled, request):
    if not compiled:
        request.getfixturevalue("no_extension")
    levels = torch.zeros(4, 3, dtype=torch.int64)
    levels[2, 1] = levels[3, 0] = bad
    with pytest.raises(ValueError, match=rf"levels must be in 0\.\.4, got {bad} for instance 2, block 1"):
        RoutingPlan.from_levels(levels, 4)


def test_levels_are_clamped_where_they_are_not_checked():
    rows, order, offsets = plan_levels_torch(torch.tensor([[9], [-3], [1], [2**32 + 1]]), 2)
    assert rows.tolist() == [[2, 0, 1, 2]]
    assert order.tolist() == [[0, 3, 2, 1]]
    assert offsets.tolist() == [[0, 2, 3, 4]]


def test_no_extension_gives_the_same_plan(no_extension):
    levels, masks = make_levels(9, 4, 3, "random", 0), make_masks(9, 4, 3, "random", 0)
    assert_same(plan_levels(levels, 3), plan_levels_reference(levels, 3))
    assert_same(plan_masks(masks), plan_masks_reference(masks))


integers = torch.zeros(4, 2, dtype=torch.int64)
route = RoutingPlan.from_levels(integers, 3)[0]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: RoutingPlan.from_levels(integers.bool(), 3),
            TypeError,
            "integer tensor, got torch.bool; masks .* from_masks",
        ),
        (lambda: RoutingPlan.from_levels(integers.float(), 3), TypeError, "integer tensor, got torch.float32"),
        (lambda: RoutingPlan.from_levels([[1, 2]], 3), TypeError, "integer tensor, got list"),
        (lambda: RoutingPlan.from_levels(integers[0], 3), ValueError, r"must be \[B, N\], got \[2\]"),
        (lambda: RoutingPlan.from_levels(integers, 0), ValueError, "groups must be at least 1, got 0"),
        (lambda: RoutingPlan.from_levels(integers.to("meta")), ValueError, "groups must be given here .* got None"),
        (lambda: RoutingPlan.from_masks(integers), TypeError, "masks must be a bool tensor, got torch.int64"),
        (lambda: RoutingPlan.from_masks(None), TypeError, "masks must be a bool tensor, got NoneType"),
        (lambda: RoutingPlan.from_masks(integers.bool()), ValueError, r"\[B, N, G\] .* got \[4, 2\]"),
        (lambda: RoutingPlan.from_masks(torch.ones(4, 2, 0) > 0), ValueError, r"at least one group, got \[4, 2, 0\]"),
        (
            lambda: RoutingPlan.from_levels(integers, 3).update_(integers[:3]),
            ValueError,
            r"\[4, 2\] on cpu, got \[3, 2\]",
        ),
        (lambda: RoutingPlan.from_levels(integers, 3).update_(integers.bool()), TypeError, "got torch.bool"),
        (lambda: as_route(route, 4, 4), ValueError, "groups must be 4, got 3"),
        (lambda: as_route(route, 3, 5), ValueError, "instances must be 5, got 4"),
        (lambda: as_route(integers[:, 0], 3, 5), ValueError, r"levels must be \[5\], got \[4\]"),
        (lambda: as_route(integers[:, 0] + 4, 3, 4), ValueError, r"in 0\.\.3, got 4 for instance 0"),
        (lambda: as_route(integers > 0, 3, 4), ValueError, r"mask must be \[4, 3\], got \[4, 2\]"),
        (lambda: as_route(integers.float(), 3, 4), TypeError, "got torch.float32"),
        (lambda: as_route(None, 3, 4), TypeError, "got NoneType"),
    ],
)
def test_bad_input_is_a_clear_error(call: Callable[[], object], error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        call()


def test_as_route_takes_routes_levels_and_masks():
    levels = torch.tensor([2, 0, 3])
    planned = as_route(levels, 3, 3)
    assert as_route(planned, 3, 3) is planned
    assert planned.order.tolist() == [2, 0, 1]
    masked = as_route(torch.arange(3) < levels[:, None], 3, 3)
    assert torch.equal(masked.order, planned.order)
    assert torch.equal(masked.selection(), planned.selection())


@pytest.mark.parametrize("of_masks", [False, True], ids=["levels", "masks"])
def test_update_keeps_the_memory(of_masks):
    make, build = (
        (make_masks, RoutingPlan.from_masks) if of_masks else (make_levels, lambda t: RoutingPlan.from_levels(t, 3))
    )
    first, second = make(9, 4, 3, "random", 1), make(9, 4, 3, "random", 2)
    kept = first.clone()
    plan, expected = build(first), build(second)
    before = [t.data_ptr() for t in torch.utils._pytree.tree_leaves(plan) if isinstance(t, Tensor)]
    route = plan[2]
    assert plan.update_(second) is plan
    leaves = torch.utils._pytree.tree_leaves(plan)
    assert [t.data_ptr() for t in leaves if isinstance(t, Tensor)] == before
    for a, b in zip(leaves, torch.utils._pytree.tree_leaves(expected), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert torch.equal(route.selection(), expected[2].selection())
    assert torch.equal(first, kept)


def test_a_plan_is_frozen_and_owns_its_memory():
    levels, masks = torch.ones(4, 1, dtype=torch.int32), torch.ones(4, 1, 2, dtype=torch.bool)
    plans = RoutingPlan.from_levels(levels, 2), RoutingPlan.from_masks(masks)
    levels.zero_()
    masks.zero_()
    for plan, count in zip(plans, (1, 2), strict=True):
        assert plan.levels.tolist() == [[count]] * 4
        with pytest.raises(dataclasses.FrozenInstanceError):
            plan.groups = 5  # type: ignore[misc]
    assert bool(plans[1][0].selection().all())


def test_opcheck():
    for dtype in (torch.int32, torch.int64):
        torch.library.opcheck(torch.ops.den_kernels.plan_levels.default, (torch.randint(0, 4, (5, 3), dtype=dtype), 3))
    torch.library.opcheck(torch.ops.den_kernels.plan_masks.default, (torch.rand(5, 3, 4) < 0.5,))


def test_plans_exist_on_the_meta_device():
    plan = RoutingPlan.from_levels(torch.zeros(5, 3, dtype=torch.int64, device="meta"), 4).to("meta")
    assert (plan.levels.shape, plan[0].order.shape, plan.offsets.shape) == ((5, 3), (5,), (3, 6))


def uses(plan: RoutingPlan) -> Tensor:
    """[B, N]: something that depends on every field of every route."""
    places = [torch.empty_like(r.order).scatter_(0, r.order.long(), torch.arange(r.order.shape[0]).int()) for r in plan]
    actives = [r.active().offsets[1] + r.offsets.sum() + r.selection().sum() for r in plan]
    return torch.stack(places, 1) * 100 + plan.levels + torch.stack(actives)


@pytest.mark.slow
def test_compile_builds_takes_and_returns_plans():
    torch._dynamo.reset()
    levels, masks = make_levels(6, 3, 4, "random", 0), make_masks(6, 3, 4, "random", 0)
    plan = RoutingPlan.from_levels(levels, 4)
    compiled = torch.compile(lambda t: uses(RoutingPlan.from_levels(t, 4)), fullgraph=True)
    assert torch.equal(compiled(levels), uses(plan))
    traced = torch.compile(lambda t: uses(RoutingPlan.from_masks(t)), fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(masks), uses(RoutingPlan.from_masks(masks)))
    traced = torch.compile(uses, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(plan), uses(plan))
    made = torch.compile(lambda t: RoutingPlan.from_levels(t, 4), fullgraph=True, backend="aot_eager")(levels)
    assert isinstance(made, RoutingPlan)
    assert torch.equal(made.order, plan.order)
    assert made[0].levels.is_contiguous()


class Planner(nn.Module):
    def forward(self, levels: Tensor) -> Tensor:
        return uses(RoutingPlan.from_levels(levels, 4))


class PlanUser(nn.Module):
    def forward(self, plan: RoutingPlan, route: Route) -> Tensor:
        return uses(plan) + route.levels[:, None]


@pytest.mark.parametrize("strict", [False, True])
def test_export_builds_and_takes_plans(strict):
    levels, other = make_levels(6, 3, 4, "random", 0), make_levels(6, 3, 4, "random", 1)
    exported = torch.export.export(Planner(), (levels,), strict=strict).module()
    plan, second = RoutingPlan.from_levels(levels, 4), RoutingPlan.from_levels(other, 4)
    assert torch.equal(exported(other), uses(second))
    exported = torch.export.export(PlanUser(), (plan, plan[0]), strict=strict).module()
    assert torch.equal(exported(second, second[1]), uses(second) + second[1].levels[:, None])


def test_export_with_a_dynamic_batch():
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(
        Planner(), (make_levels(6, 3, 4, "random", 0),), dynamic_shapes=({0: batch},)
    ).module()
    other = make_levels(11, 3, 4, "random", 1)
    assert torch.equal(exported(other), uses(RoutingPlan.from_levels(other, 4)))


@pytest.mark.parametrize(
    ("masks", "name", "wrong"),
    [
        (False, "levels", lambda t: t.long()), (False, "order", lambda t: t.float()),
        (False, "offsets", lambda t: t[1:]), (False, "offsets", lambda t: t.repeat_interleave(2)[::2]),
        (True, "mask", lambda t: t.int()), (True, "mask", lambda t: t[:, 1:]), (True, "offsets", lambda t: t[:-1]),
    ],
)  # fmt: skip
def test_a_route_that_is_no_plans_is_refused_where_no_kernel_looks_at_it(monkeypatch, masks, name, wrong):
    monkeypatch.setattr("den_kernels.plan.extension", None)
    chosen = make_masks(7, 1, 4, "random", 0) if masks else make_levels(7, 1, 4, "random", 0)
    route = (RoutingPlan.from_masks(chosen) if masks else RoutingPlan.from_levels(chosen, 4))[0]
    x = torch.zeros(7, 8, 2, 2)
    assert route_for(x, route, 4, "op") is route
    with pytest.raises(ValueError, match=rf"op: route\.{name} must be"):
        route_for(x, dataclasses.replace(route, **{name: wrong(getattr(route, name))}), 4, "op")


@pytest.mark.parametrize("levels", [[], [1], [0, 2, 1]])
def test_reading_a_route_gives_its_offsets_and_order(levels):
    route = RoutingPlan.from_levels(torch.tensor(levels, dtype=torch.int64)[:, None], 2)[0]
    assert read_route(route) == (route.offsets.tolist(), route.order.tolist())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_plan_on_a_gpu_never_waits_for_it():
    levels, masks = make_levels(300, 15, 4, "random", 0), make_masks(300, 15, 70, "random", 0)
    on_gpu = levels.cuda(), masks.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plans = RoutingPlan.from_levels(on_gpu[0], 4), RoutingPlan.from_masks(on_gpu[1])
        [route.active() for plan in plans for route in plan]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for plan, expected in zip(plans, (RoutingPlan.from_levels(levels, 4), RoutingPlan.from_masks(masks)), strict=True):
        assert torch.equal(plan.order.cpu(), expected.order)
        assert torch.equal(plan.offsets.cpu(), expected.offsets)
    with pytest.raises(ValueError, match="got 9 for instance 0, block 0"):
        RoutingPlan.from_levels(on_gpu[0] * 0 + 9, 4, check=True)


@pytest.mark.parametrize("masks", [False, True])
def test_a_part_of_a_plan_has_the_routes_of_its_blocks_in_the_same_memory(masks):
    generator = torch.Generator().manual_seed(0)
    if masks:
        plan = RoutingPlan.from_masks(torch.rand(7, 5, 3, generator=generator) < 0.5)
    else:
        plan = RoutingPlan.from_levels(torch.randint(0, 4, (7, 5), generator=generator), 3)
    part = plan.part(range(1, 4))
    assert (len(part), part.batch_size, part.groups) == (3, 7, 3)
    for own, wanted in zip(part, list(plan)[1:4], strict=True):
        for name in ("levels", "order", "offsets", "mask"):
            mine, theirs = getattr(own, name), getattr(wanted, name)
            assert (mine is None) == (theirs is None)
            assert mine is None or (torch.equal(mine, theirs) and mine.data_ptr() == theirs.data_ptr())
    assert plan.part(range(5)) is plan
