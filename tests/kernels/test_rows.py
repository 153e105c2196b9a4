"""Rows gathered, scattered and pooled: against the torch expressions that their docstrings give."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from den_kernels import rows
from den_kernels.rows import gather_rows, pool_rows, scatter_rows_
from tests.fuzz import examples

SIZES = st.tuples(st.integers(1, 5), st.sampled_from([1, 3, 4, 16, 63, 64, 129]), st.integers(1, 7), st.integers(1, 7))
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def channels_last(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def some_order(batch: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(0, batch + 1, (), generator=generator))
    return torch.randperm(batch, generator=generator)[:count].int()


@pytest.fixture(params=["extension", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(rows, "extension", None)
    else:
        assert rows.extension is not None, "the C++ extension was not built"
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(size=SIZES, seed=st.integers(0, 99), part=st.floats(0, 1), affine=st.booleans(), relu=st.booleans())
@examples(40)
def test_gather_is_indexing_affine_and_relu(dtype, size, seed, part, affine, relu):
    B, C, _H, _W = size
    x, order = channels_last(*size, seed=seed, dtype=dtype), some_order(B, seed)
    start = int(part * (C - 1))
    width = C - start
    scale, shift = torch.randn(2, width).unbind() if affine else (None, None)
    got = gather_rows(x, order, width, scale, shift, relu, start=start)
    exact = x[order.long(), start:].double()
    if affine:
        exact = exact * scale[:, None, None].double() + shift[:, None, None].double()
    exact = exact.relu() if relu else exact
    assert got.shape == exact.shape
    assert got.dtype == dtype
    assert not len(order) or got.is_contiguous(memory_format=torch.channels_last)
    if affine:  # an fma rounds once, a product and a sum twice
        torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    else:
        assert torch.equal(got.double(), exact)


def test_float16_rows_are_widened_and_narrowed(way):
    x = channels_last(4, 20, 3, 5, dtype=torch.float16)
    order = torch.tensor([2, 0], dtype=torch.int32)
    wide = gather_rows(x, order, 20, dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(wide, x[[2, 0]].float())
    out = torch.zeros_like(x)
    scatter_rows_(out, wide, order)
    assert torch.equal(out[[2, 0]], x[[2, 0]])
    assert not out[[1, 3]].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("channels", "start", "width"), [(64, 0, 64), (64, 16, 32), (16, 0, 16), (63, 1, 5)])
def test_scatter_writes_only_its_rows_and_channels(way, dtype, accumulate, channels, start, width):
    dst, src = channels_last(5, channels, 6, 4, dtype=dtype), channels_last(3, width, 6, 4, seed=1, dtype=dtype)
    order = torch.tensor([4, 0, 3], dtype=torch.int32)
    expected = dst.clone()
    expected[order.long(), start : start + width] = (
        dst[order.long(), start : start + width] + src if accumulate else src
    )
    scatter_rows_(dst, src, order, start, accumulate)
    assert torch.equal(dst, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "stride"), [((8, 8), 2), ((7, 5), 2), ((4, 4), 1), ((1, 1), 2), ((9, 9), 3)])
def test_pool_is_average_pooling_and_zero_channels(way, dtype, size, stride):
    x = channels_last(3, 20, *size, dtype=dtype)
    got = pool_rows(x, 33, stride)
    exact = F.pad(F.avg_pool2d(x.double(), stride, ceil_mode=True), (0, 0, 0, 0, 0, 13))
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert not got[:, 20:].any()


def test_pool_returns_memory_of_its_own(way):
    x = channels_last(2, 16, 4, 4)
    assert pool_rows(x, 16, 1).data_ptr() != x.data_ptr()


def test_nan_passes_through_relu(way):
    x = torch.full((1, 16, 2, 2), float("nan")).contiguous(memory_format=torch.channels_last)
    order = torch.zeros(1, dtype=torch.int32)
    assert gather_rows(x, order, 16, torch.ones(16), torch.zeros(16), relu=True).isnan().all()


def test_empty_order_and_batch(way):
    x = channels_last(2, 16, 4, 4)
    none = torch.zeros(0, dtype=torch.int32)
    assert gather_rows(x, none, 16).shape == (0, 16, 4, 4)
    before = x.clone()
    scatter_rows_(x, x[:0], none, accumulate=True)
    assert torch.equal(x, before)
    assert pool_rows(x[:0], 32, 2).shape == (0, 32, 2, 2)
