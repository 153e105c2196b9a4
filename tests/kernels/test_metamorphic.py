"""Calls that must agree with each other, whatever their numbers are: of every op, on any input."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from den.nn.blocks import BottleneckBlock, BottleneckShape
from den_kernels import GraphWeights, RoutingPlan, dynamic_batch_norm, dynamic_conv2d, dynamic_graph, dynamic_residual
from den_kernels.plan import as_route
from den_kernels.testing import LAYOUTS, LEVEL_KINDS, in_layout, make_levels, poison_unread
from tests.fuzz import examples
from tests.kernels.test_dynamic_residual import Block
from tests.oracle import unlike_new

NEAR = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the largest value


@dataclass
class Case:
    """An op and its arguments. Calls with a part of the batch, or a selection of another form, must agree."""

    run: Callable[[Tensor, Tensor], Tensor]  # x [B, C, H, W], levels [B] or [B, E], or a mask [B, G]
    x: Tensor
    levels: Tensor
    groups: int
    reads: tuple[int, ...] = ()  # the sizes of the groups of x that are read where they are selected; (): all are

    def agrees(self, got: Tensor, wanted: Tensor) -> None:
        """Assert that two results are the same but for the order of sums."""
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        largest = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(got, wanted, rtol=0, atol=NEAR[got.dtype] * max(1.0, largest))


def convolution(draw: st.DrawFn, random: torch.Generator, dtype: torch.dtype, groups: list[int]) -> Case:
    side, kernel = draw(st.sampled_from(["out", "in", "both"])), draw(st.sampled_from([(1, 1), (3, 3), (5, 2)]))
    inputs, outputs = sum(groups), sum(groups)
    settings = {
        "padding": (kernel[0] // 2, kernel[1] // 2), "stride": draw(st.sampled_from([1, 1, 2])),
        "out_groups": groups if side != "in" else None, "in_groups": groups if side != "out" else None,
    }  # fmt: skip
    weight = (torch.randn(outputs, inputs, *kernel, generator=random) / (inputs * 3) ** 0.5).to(dtype)
    if draw(st.booleans()):
        weight = weight.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(outputs, generator=random).to(dtype)
    x = torch.randn(draw(BATCHES), inputs, *draw(SIDES), generator=random).to(dtype)
    run = lambda x, selection: dynamic_conv2d(x, weight, bias, selection, **settings)  # noqa: E731
    return Case(run, x, levels_of(draw, len(x), len(groups)), len(groups), tuple(groups) if side != "out" else ())


def norm(draw: st.DrawFn, random: torch.Generator, dtype: torch.dtype, groups: list[int]) -> Case:
    C, relu = sum(groups), draw(st.booleans())
    weight, bias, mean = torch.randn(3, C, generator=random).unbind()
    var = torch.rand(C, generator=random) + 0.5
    x = torch.randn(draw(BATCHES), C, *draw(SIDES), generator=random).to(dtype)

    def run(x: Tensor, selection: Tensor) -> Tensor:
        return dynamic_batch_norm(x, selection, weight, bias, mean, var, groups=groups, relu=relu)

    return Case(run, x, levels_of(draw, len(x), len(groups)), len(groups), tuple(groups))


def residual(draw: st.DrawFn, random: torch.Generator, dtype: torch.dtype, groups: list[int]) -> Case:
    stride, C = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([16, 20, 32]))
    block = Block(C, tuple(groups), C * stride, stride, first=draw(st.booleans()), seed=draw(SEEDS))
    weights = block.to(dtype).fold(draw(st.booleans()))
    x = torch.randn(draw(BATCHES), C, *draw(SIDES), generator=random).to(dtype)
    run = lambda x, selection: dynamic_residual(x, selection, weights)  # noqa: E731
    return Case(run, x, levels_of(draw, len(x), len(groups)), len(groups))


def bottleneck(draw: st.DrawFn, random: torch.Generator, dtype: torch.dtype, _: list[int]) -> Case:
    stride, cardinality, size = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 1, 4])), draw(SIDES)
    torch.manual_seed(draw(SEEDS))
    made = BottleneckBlock(BottleneckShape(32, 64, 32 * stride, max(size), stride, cardinality), 4)
    block = unlike_new(made).to(dtype).eval()
    x = torch.randn(draw(BATCHES), 32, *size, generator=random).to(dtype)

    @torch.no_grad()  # in one call
    def run(x: Tensor, selection: Tensor) -> Tensor:
        return block(x, as_route(selection, 3, len(x)))

    return Case(run, x, levels_of(draw, len(x), 3), 3)


def graph(draw: st.DrawFn, random: torch.Generator, dtype: torch.dtype, groups: list[int]) -> Case:
    C, edges = sum(groups), [(0, 1), (0, 2), (1, 2)]
    weights = [(torch.randn(C, C, 3, 3, generator=random) / (9 * C) ** 0.5).to(dtype) for _ in edges]
    packed = GraphWeights.pack(3, edges, weights, [torch.randn(C, generator=random).to(dtype) for _ in edges])
    x = torch.randn(draw(BATCHES), C, *draw(SIDES), generator=random).to(dtype)
    gates = torch.rand(3, generator=random).to(dtype)

    def run(x: Tensor, levels: Tensor) -> Tensor:
        masks = levels.dtype == torch.bool
        plan = RoutingPlan.from_masks(levels[:, :, None]) if masks else RoutingPlan.from_levels(levels, 1)
        return dynamic_graph(x, packed, plan, *(gates.repeat(len(x), 1) for _ in range(3)))

    return Case(run, x, torch.randint(2, (len(x), 3), generator=random), 1)


OPS = {"convolution": convolution, "norm": norm, "residual": residual, "bottleneck": bottleneck, "graph": graph}
BATCHES, SEEDS = st.integers(1, 9), st.integers(0, 999)
SIDES = st.tuples(st.integers(1, 14), st.integers(1, 14))
GROUPS = st.lists(st.integers(1, 20), min_size=1, max_size=4)


def levels_of(draw: st.DrawFn, batch: int, groups: int) -> Tensor:
    return make_levels(draw(st.sampled_from(LEVEL_KINDS)), batch, groups, draw(SEEDS))


@st.composite
def cases(draw: st.DrawFn, op: str) -> Case:
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    case = OPS[op](draw, torch.Generator().manual_seed(draw(SEEDS)), dtype, draw(GROUPS))
    case.x = in_layout(case.x, draw(st.sampled_from(LAYOUTS)))
    return case


@contextmanager
def convolutions_of_pytorch() -> Iterator[list[str]]:
    """The names of PyTorch's functions that convolve in what runs meanwhile."""
    calls: list[str] = []

    def noted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: object, **named: object) -> Tensor:
            calls.append(name)
            return function(*arguments, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((torch, "convolution"), (F, "conv2d"), (F, "linear")):
            patch.setattr(module, name, noted(name, getattr(module, name)))
        yield calls


every_op = pytest.mark.parametrize("op", OPS)


@every_op
@examples(4)
@given(data=st.data())
def test_a_batch_in_another_order(op, data):
    case = data.draw(cases(op))
    order = torch.randperm(len(case.x), generator=torch.Generator().manual_seed(data.draw(SEEDS)))
    case.agrees(case.run(case.x[order], case.levels[order]), case.run(case.x, case.levels)[order])


@every_op
@examples(4)
@given(data=st.data())
def test_one_instance_after_the_other(op, data):
    case = data.draw(cases(op))
    alone = [case.run(case.x[b : b + 1], case.levels[b : b + 1]) for b in range(len(case.x))]
    case.agrees(torch.cat(alone), case.run(case.x, case.levels))


@every_op
@examples(4)
@given(data=st.data())
def test_two_threads_give_the_bits_of_one(op, data):
    """Where PyTorch convolves, whose sums depend on the number of threads: the same but for their order."""
    case, results = data.draw(cases(op)), []
    with convolutions_of_pytorch() as calls:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(case.run(case.x, case.levels))
    if calls:
        case.agrees(*results)
    else:
        assert torch.equal(*results)


@every_op
@examples(4)
@given(data=st.data())
def test_masks_of_the_first_groups_are_levels(op, data):
    case = data.draw(cases(op))
    mask = case.levels.bool() if op == "graph" else case.levels[:, None] > torch.arange(case.groups)
    case.agrees(case.run(case.x, mask), case.run(case.x, case.levels))


@every_op
@examples(4)
@given(data=st.data())
def test_what_is_not_selected_is_not_read(op, data):
    """NaN in the channels that an instance did not select or, where all are read, in another instance."""
    case = data.draw(cases(op))
    if case.reads:
        poisoned = in_layout(poison_unread(case.x, case.levels, case.reads), "channels_last")
        same = torch.empty_like(poisoned).copy_(case.x)  # with the same strides: else another kernel may take it
        assert torch.equal(case.run(poisoned, case.levels), case.run(same, case.levels))
    else:
        b = data.draw(st.integers(0, len(case.x) - 1))
        wanted, poisoned = case.run(case.x, case.levels), case.x.clone()
        poisoned[b] = float("nan")
        got = case.run(poisoned, case.levels)
        others = torch.arange(len(case.x)) != b
        case.agrees(got[others], wanted[others])
