"""Compressed pictures as arrays of one size."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from PIL import Image

PART = 500  # images decoded before they are handed on
Fit = Callable[[Image.Image], Image.Image]


def pictures(named: Iterable[tuple[str, bytes]], fit: Fit | None = None) -> Iterator[np.ndarray]:
    """Names and contents of picture files as uint8 [n, H, W, 3], in parts; `fit` brings each to its size.

    Raises ValueError that names a file that is no picture, or not of the size of the others.
    """
    part: list[np.ndarray] = []
    shape = None
    for name, content in named:
        try:
            picture = Image.open(io.BytesIO(content)).convert("RGB")
            array = np.asarray(picture if fit is None else fit(picture))
        except OSError as error:
            raise ValueError(f"load_set: {name} must be a complete picture, got {error}") from error
        shape = shape or array.shape
        if array.shape != shape:
            raise ValueError(f"load_set: {name} must be of {shape[1]}x{shape[0]} pixels, got {picture.size}")
        part.append(array)
        if len(part) == PART:
            yield np.stack(part)
            part = []
    if part:
        yield np.stack(part)


def square(size: int) -> Fit:
    """To `size` x `size` pixels, as the papers do it: 224 is the centre of 256 x 256, any other size is scaled to."""
    if size != 224:
        return lambda picture: picture.resize((size, size), Image.Resampling.BILINEAR)
    return lambda picture: picture.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
