"""Packed pieces, `NAME.SPLIT0.npz` and so on: sets in files small enough to be carried about.

A piece holds `meta`, JSON of `kind`, `shape` [n, H, W] or [n, H, W, 3] and the `sha256` of the pixels, an array per
kind of label, `i` the index in the published set, and by kind:

- bits: `data`, xz of the packed bits, rows padded to whole bytes;
- med: `data`, xz of the residuals [n, 3, H, W] of the median edge predictor on G, R - G, B - G (LOCO-I, Weinberger,
  Seroussi and Sapiro, 2000);
- jpeg: the JPEG files byte for byte: `scan`, their scans one after the other, `len` of each, `head0` and `head1`, the
  headers of all colour and of all grey ones, `grey` which of them an image has.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from den.data.decode import pictures
from den.data.store import Pixels

PAYLOAD = ("meta", "data", "scan", "len", "head0", "head1", "grey")
BROKEN = (OSError, KeyError, ValueError, EOFError, IndexError, lzma.LZMAError, zipfile.BadZipFile)
END_OF_IMAGE = b"\xff\xd9"


def find_pieces(root: Path, name: str, split: str) -> tuple[Path, ...]:
    """The pieces of a split in their order; none where there are none."""
    return tuple(sorted(root.glob(f"{name}.{split}[0-9]*.npz"), key=lambda path: (len(path.name), path.name)))


def open_pieces(paths: tuple[Path, ...]) -> Pixels:
    """All of these pieces, one after the other.

    Raises ValueError for a piece that is incomplete, of an unknown kind, or whose pixels do not match their sha256;
    about its pixels when these are read.
    """
    opened = [_labels(path) for path in paths]
    shapes = [shape for shape, _ in opened]
    labels = {kind: np.concatenate([labels[kind] for _, labels in opened]) for kind in opened[0][1]}
    return Pixels((sum(shape[0] for shape in shapes), *shapes[0][1:]), labels, map(piece_pixels, paths))


def _labels(path: Path) -> tuple[tuple[int, ...], dict[str, np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as piece:
            meta = json.loads(piece["meta"].tobytes())
            return tuple(meta["shape"]), {key: piece[key] for key in piece.files if key not in PAYLOAD}
    except BROKEN as error:
        raise ValueError(f"load_set: {path} must be a complete packed piece, got {error}") from error


def piece_pixels(path: Path) -> np.ndarray:
    """Pixels of a piece: uint8 [n, H, W, 3]; of bits 0 or 1, [n, H, W].  ValueError as of `open_pieces`."""
    try:
        with np.load(path, allow_pickle=False) as piece:
            arrays = {key: piece[key] for key in piece.files if key in PAYLOAD}
        meta = json.loads(arrays.pop("meta").tobytes())
        pixels = np.ascontiguousarray(KINDS[meta["kind"]](arrays, meta["shape"]))
    except BROKEN as error:
        raise ValueError(f"load_set: {path} must be a complete packed piece, got {error}") from error
    if hashlib.sha256(pixels.tobytes()).hexdigest() != meta.get("sha256"):
        raise ValueError(f"load_set: pixels of {path} must match their sha256; the file is damaged")
    return pixels


def _bits(arrays: dict[str, np.ndarray], shape: list[int]) -> np.ndarray:
    packed = np.frombuffer(lzma.decompress(arrays["data"].tobytes()), np.uint8).reshape(*shape[:2], -1)
    return np.unpackbits(packed, axis=-1)[..., : shape[2]]


def _median_edge(arrays: dict[str, np.ndarray], shape: list[int]) -> np.ndarray:
    """Undo the predictor pixel by pixel, all images at once."""
    n, height, width, _ = shape
    residuals = np.frombuffer(lzma.decompress(arrays["data"].tobytes()), np.uint8).reshape(n, 3, height, width)
    residuals = residuals.transpose(2, 3, 0, 1).astype(np.int16)
    planes = np.zeros((height + 1, width + 1, n, 3), np.int16)  # G, R - G, B - G, with a border of zeros
    for y in range(height):
        for x in range(width):
            left, above, corner = planes[y + 1, x], planes[y, x + 1], planes[y, x]
            high, low = np.maximum(left, above), np.minimum(left, above)
            predicted = np.where(corner >= high, low, np.where(corner <= low, high, left + above - corner))
            value = residuals[y, x] + predicted
            green = value[:, :1] & 255
            colours = ((value[:, 1:] + green) & 255) - green  # so that G plus a difference is a byte again
            planes[y + 1, x + 1] = np.concatenate([green, colours], 1)
    green, red, blue = planes[1:, 1:].transpose(3, 2, 0, 1)
    return np.stack([red + green, green, blue + green], -1).astype(np.uint8)


def _jpeg(arrays: dict[str, np.ndarray], shape: list[int]) -> np.ndarray:
    heads = [arrays[key].tobytes() for key in ("head0", "head1")]
    ends = arrays["len"].astype(np.int64).cumsum()
    scans = arrays["scan"].tobytes()
    files = (
        (f"image {index}", heads[grey] + scans[end - length : end] + END_OF_IMAGE)
        for index, (grey, length, end) in enumerate(
            zip(arrays["grey"].tolist(), arrays["len"].tolist(), ends.tolist(), strict=True)
        )
    )
    return np.concatenate(list(pictures(files))).reshape(shape)


KINDS: dict[str, Any] = {"bits": _bits, "med": _median_edge, "jpeg": _jpeg}
