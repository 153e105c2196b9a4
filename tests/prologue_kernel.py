"""A convolution that calculates between load and product: the pattern that no kernel of ours may have."""

import torch
import triton
import triton.language as tl

from den_kernels._triton.launch import Launch
from tests.launches import Code, compile_launch


@triton.jit
def convolve_1d(
    x, weight, y, scale, shift, M, taps,
    PROLOGUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [M, BN] = sum over taps t of relu(x * scale + shift) [M, BK] moved by t rows @ weight [BK, BN] of that tap."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for tap in range(0, taps):
        k = tap * BK + tl.arange(0, BK)
        inside = ((m + tap) >= 0) & ((m + tap) < M)
        a = tl.load(x + (m + tap)[:, None] * (taps * BK) + k[None, :], mask=inside[:, None], other=0.0)
        if PROLOGUE:
            value = a.to(tl.float32) * tl.load(scale + k)[None, :] + tl.load(shift + k)[None, :]
            value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
            a = tl.where(inside[:, None], value, 0.0).to(a.dtype)
        b = tl.load(weight + k[:, None] + n[None, :] * (taps * BK))
        acc = tl.dot(a, b, acc)
    tl.store(y + m[:, None] * BN + n[None, :], acc.to(y.dtype.element_ty), mask=(m < M)[:, None])


def compiled(prologue: bool) -> Code:
    """For Hopper, in bfloat16, with a tile and a pipeline as the convolutions have them."""
    half, full = (torch.empty(1, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32))
    arguments = {"x": half, "weight": half, "y": half, "scale": full, "shift": full, "M": 4096, "taps": 48}
    arguments |= {"PROLOGUE": prologue, "BM": 128, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3}
    return compile_launch(Launch(convolve_1d, 1, arguments), 90)
