"""The residual block on weights that are not packed but read where they are, as test_dynamic_residual.py checks it."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given
from hypothesis import strategies as st

from den_kernels import dynamic_residual, residual_weights
from den_kernels._extension import extension
from den_kernels.testing import make_levels, make_mask
from tests.fuzz import examples
from tests.kernels.test_dynamic_residual import CASES, Block, check, image


@pytest.fixture
def any_width(monkeypatch):
    """Weights of any width stay where they are, where the direct kernel runs."""
    if not Block(16, (16,)).fold().direct:
        pytest.skip("this CPU lacks AVX2: no direct kernel reads the weights")
    monkeypatch.setattr(residual_weights, "_WIDE", (0, 0))


DTYPES = [torch.float32, torch.bfloat16]


def needs(dtype):
    """Skip where the direct kernel of `dtype` reads packed weights alone."""
    if dtype == torch.bfloat16 and (extension is None or extension.bf16_isa() != "AVX-512 BF16"):
        pytest.skip("this CPU has no AVX-512 BF16, or has AMX: bfloat16 weights are packed")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["uniform", "zero", "top", "no middle", "mask"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "odd channels"])
def test_weights_where_they_are_against_the_oracle(case, kind, dtype, any_width):
    needs(dtype)
    make, shape = CASES[case]
    block, sizes = Block(**make).to(dtype), (shape[0], len(make["groups"]))
    if dtype == torch.bfloat16 and sum(make["groups"]) % 2:
        pytest.skip("an odd number of hidden channels is packed in bfloat16")
    weights = block.fold(copy=False)
    assert weights.unpacked == (True, True)
    assert weights.direct[0].data_ptr() == block.conv1.weight.data_ptr()
    selection = make_mask(*sizes) if kind == "mask" else make_levels(kind, *sizes)
    check(block, image(*shape).to(dtype), selection, copy=False)


@given(
    batch=st.integers(0, 20),
    channels=st.sampled_from([16, 48, 528]),  # the last: more than a span
    groups=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    stride=st.integers(1, 2),
    masks=st.booleans(),
    threads=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES if extension is not None and extension.bf16_isa() == "AVX-512 BF16" else DTYPES[:1]),
    seed=st.integers(0, 999),
)
@examples(40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_weights_where_they_are_in_any_shape(
    batch, channels, groups, size, stride, masks, threads, dtype, seed, any_width
):
    # oneDNN's own bfloat16 convolution, the peer, is wrong here: see test_dynamic_residual.test_any_shape.
    assume(dtype == torch.float32 or stride == 1 or size[1] > 2)
    block, sizes = Block(channels, tuple(groups), stride=stride, seed=seed).to(dtype), (batch, len(groups), seed)
    selection = make_mask(*sizes) if masks else make_levels("uniform", *sizes)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(block, image(batch, channels, *size, seed=seed).to(dtype), selection, copy=False)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("wide", [(0, 99), (99, 0)], ids=["conv1 alone", "conv2 alone"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_weight_where_it_is(wide, dtype, any_width, monkeypatch):
    needs(dtype)
    monkeypatch.setattr(residual_weights, "_WIDE", wide)
    block = Block(64, (16, 16, 32)).to(dtype)
    assert block.fold(copy=False).unpacked == (wide[0] == 0, wide[1] == 0)
    check(block, image(9, 64, 8, 8).to(dtype), make_levels("uniform", 9, 3), copy=False)


def test_weights_stay_where_they_are_only_when_wide_and_channels_last(any_width, monkeypatch):
    monkeypatch.setattr(residual_weights, "_WIDE", (32, 48))
    block, x, levels = Block(32, (16, 32)), image(3, 32, 5, 5), torch.tensor([0, 1, 2])
    assert block.fold(copy=False).unpacked == (True, True)
    assert block.fold().unpacked == (False, False)
    released = block.fold(copy=False).released()
    assert released.unpacked == (False, False)
    assert torch.equal(dynamic_residual(x, levels, released), dynamic_residual(x, levels, block.fold()))
    assert Block(32, (16, 16)).fold(copy=False).unpacked == (True, False)
    assert Block(16, (16, 32)).fold(copy=False).unpacked == (False, True)
    pairs = extension.bf16_isa() == "AVX-512 BF16"
    assert Block(32, (16, 32)).bfloat16().fold(copy=False).unpacked == (pairs, pairs)
    assert Block(32, (16, 33)).bfloat16().fold(copy=False).unpacked == (False, False)
    assert block.to(memory_format=torch.contiguous_format).fold(copy=False).unpacked == (False, False)
