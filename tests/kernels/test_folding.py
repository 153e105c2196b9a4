"""A batch norm in eval mode as an affine map, and folded into the convolution before it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from den_kernels.building import fold_norm, norm_affine
from tests.fuzz import examples
from tests.oracle import unlike_new

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@examples(30)
@given(
    dtype=st.sampled_from(DTYPES),
    of_norm=st.sampled_from(DTYPES),
    channels=st.integers(1, 9),
    affine=st.booleans(),
    bias=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-2]),
)
def test_the_folded_convolution_is_the_two_layers(dtype, of_norm, channels, affine, bias, eps):
    torch.manual_seed(channels)
    conv = nn.Conv2d(3, channels, 3, bias=bias).to(dtype)
    norm = unlike_new(nn.BatchNorm2d(channels, eps)).eval().to(of_norm)
    if not affine:
        norm.weight = norm.bias = None
    weight, shifted = fold_norm(conv.weight, conv.bias, norm)
    wide = torch.promote_types(dtype, torch.float32)
    assert (weight.dtype, shifted.dtype) == (dtype, wide)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.requires_grad
    assert not shifted.requires_grad
    x = torch.randn(2, 3, 5, 5).double()
    got = nn.functional.conv2d(x, weight.double(), shifted.double())
    with torch.no_grad():
        expected = norm.double()(conv.double()(x))
    near = 32 * torch.finfo(dtype).eps  # one rounding of each of 27 weights
    torch.testing.assert_close(got, expected, rtol=near, atol=near * max(1.0, expected.abs().max().item()))


def test_the_affine_map_is_at_least_float32():
    for dtype in DTYPES:
        scale, shift = norm_affine(nn.BatchNorm2d(4).half(), dtype)
        assert scale.dtype == shift.dtype == torch.promote_types(dtype, torch.float32)


def test_statistics_must_be_tracked():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ValueError, match="norm_affine: norm must track running statistics, got BatchNorm2d"):
        norm_affine(norm, torch.float32)
    with pytest.raises(ValueError, match="block: bn2 must track running statistics"):
        fold_norm(torch.zeros(4, 3, 1, 1), None, norm, "block: bn2")
