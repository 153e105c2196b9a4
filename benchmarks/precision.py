"""Precision of float32 products on a GPU while something is checked or timed: rounded to TF32, or not."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from den_kernels.float32 import allows_tf32


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Convolutions and matrix products of float32 may be rounded to TF32, or are not, whatever was said before.

    Only the new settings are read: the older `allow_tf32` raises an error where the two disagree. Both are written,
    because torch.compile still reads the older one when it searches for a convolution's kernel.
    """
    cudnn: Any = torch.backends.cudnn  # torch's annotations leave out `conv` and `rnn`
    settings = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    before, allowed = [setting.fp32_precision for setting in settings], allows_tf32()
    precisions = ["tf32" if tf32 else "ieee"] * len(settings)
    try:
        _write(tf32, settings, precisions)
        yield
    finally:
        _write(allowed, settings, before)


def _write(tf32: bool, settings: tuple[Any, ...], precisions: list[str]) -> None:
    torch.backends.cudnn.allow_tf32 = tf32
    for setting, precision in zip(settings, precisions, strict=True):
        setting.fp32_precision = "none"  # as the settings above it say, where that is the same
        if setting.fp32_precision != precision:
            setting.fp32_precision = precision


@contextlib.contextmanager
def fast_convolutions(tf32: bool) -> Iterator[None]:
    """`float32_products`, and cuDNN's fastest algorithm for everybody."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with float32_products(tf32):
            yield
    finally:
        torch.backends.cudnn.benchmark = before
