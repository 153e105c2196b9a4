"""Packed pieces, `NAME.SPLIT0.npz` and so on: sets in files small enough to be carried about.

A piece holds `meta`, JSON of `kind`, `shape` [n, H, W] or [n, H, W, 3] and the `sha256` of the pixels, an array per
kind of label, `i` the index in the published set, and by kind:

- bits: `data`, xz of the packed bits, rows padded to whole bytes;
- med: `data`, xz of the residuals [n, 3, H, W] of the median edge predictor on G, R - G, B - G (LOCO-I, Weinberger,
  Seroussi and Sapiro, 2000);
- jpeg: the JPEG files byte for byte: `scan`, their scans one after the other, `len` of each, `head0` and `head1`, the
  headers of all colour and of all grey ones, `grey` which of them an image has.
"""

import hashlib
import json
import lzma
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from den.data.checks import blamed, whole_labels
from den.data.decode import pictures
from den.data.store import Pixels

PAYLOAD = ("meta", "data", "scan", "len", "head0", "head1", "grey")
END_OF_IMAGE = b"\xff\xd9"
MOST = 2**31  # bytes of the pixels of a piece


def find_pieces(root: Path, name: str, split: str) -> tuple[Path, ...]:
    """The pieces of a split in their order; none where there are none."""
    piece = re.compile(rf"{re.escape(name)}\.{split}\d+\.npz")  # and not a browser's second copy of one
    found = (path for path in root.glob(f"{name}.{split}[0-9]*.npz") if piece.fullmatch(path.name))
    return tuple(sorted(found, key=lambda path: (len(path.name), path.name)))


def open_pieces(paths: tuple[Path, ...], kinds: dict[str, int], rank: int = 4) -> Pixels:
    """Read pieces one after the other, with the labels `kinds`, each of 0..classes - 1.

    rank: of the pixels: 3 for bits, 4 for colours.

    Raises ValueError for a piece that is incomplete, of an unknown kind, with other labels or sizes than these, or
    whose pixels do not match their sha256; about its pixels when these are read.
    """
    shapes, labels = [], []
    for path in paths:
        with blamed("load_set", path, "be a complete packed piece"), np.load(path, allow_pickle=False) as piece:
            shapes.append(tuple(map(int, json.loads(piece["meta"].tobytes())["shape"])))
            labels.append({key: piece[key] for key in piece.files if key not in PAYLOAD})
        if len(shapes[-1]) != rank:
            raise ValueError(f"load_set: {path} must hold pixels of {rank} axes, got {list(shapes[-1])}")
    shape, joint = joined("load_set", paths, shapes, labels, kinds)
    return Pixels(shape, joint, map(piece_pixels, paths))


def joined(
    op: str,
    paths: Sequence[Path],
    shapes: Sequence[tuple[int, ...]],  # of the pixels of each
    labels: Sequence[dict[str, np.ndarray]],  # of each, by kind: [n]
    kinds: dict[str, int],  # classes of the kinds that are wanted
) -> tuple[tuple[int, ...], dict[str, np.ndarray]]:
    """Shape [N, H, W, 3] or [N, H, W] and labels int64 [N] by kind of several pieces, one after the other.

    Raises ValueError for a piece whose images or labels do not go with the others.
    """
    parts: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    for path, shape, own in zip(paths, shapes, labels, strict=True):
        if shape[1:] != shapes[0][1:]:
            raise ValueError(f"{op}: {path} must hold images {list(shapes[0][1:])} as the first, got {list(shape[1:])}")
        for kind, classes in kinds.items():
            values = whole_labels(op, f"{path}, {kind},", own.get(kind, ()), classes)
            if len(values) != shape[0]:
                raise ValueError(f"{op}: {path} must hold {shape[0]} labels {kind}, got {len(values)}")
            parts[kind].append(values)
    count = sum(shape[0] for shape in shapes)
    return (count, *shapes[0][1:]), {kind: np.concatenate(values) for kind, values in parts.items()}


def piece_pixels(path: Path) -> np.ndarray:
    """Pixels of a piece: uint8 [n, H, W, 3]; of bits 0 or 1, [n, H, W]. ValueError as of `open_pieces`."""
    with blamed("load_set", path, "be a complete packed piece"):
        with np.load(path, allow_pickle=False) as piece:
            arrays = {key: piece[key] for key in piece.files if key in PAYLOAD}
        meta = json.loads(arrays.pop("meta").tobytes())
        pixels = np.ascontiguousarray(KINDS[meta["kind"]](arrays, meta["shape"]))
    if hashlib.sha256(pixels.tobytes()).hexdigest() != meta.get("sha256"):
        raise ValueError(f"load_set: pixels of {path} must match their sha256; the file is damaged")
    return pixels


def unpacked(content: bytes, size: int) -> np.ndarray:
    """The bytes that an xz stream holds: uint8 [size]; no more is ever unpacked, whatever the stream says.

    Raises ValueError where it holds another number of bytes or is to hold more than `MOST`.
    """
    if not 0 <= size <= MOST:
        raise ValueError(f"pixels of {size:,} bytes, more than {MOST:,}")
    stream = lzma.LZMADecompressor()
    found = stream.decompress(content, max_length=size + 1) if content else b""
    if len(found) != size or not stream.eof:
        raise ValueError(
            f"{'more than ' if len(found) > size else ''}{min(len(found), size):,} bytes instead of {size:,}"
        )
    return np.frombuffer(found, np.uint8)


def _bits(arrays: dict[str, np.ndarray], shape: list[int]) -> np.ndarray:  # uint8 [n, H, W]
    n, height, width = shape
    row = -(-width // 8)
    packed = unpacked(arrays["data"].tobytes(), n * height * row).reshape(n, height, row)
    return np.unpackbits(packed, axis=-1)[..., : shape[2]]


def _median_edge(arrays: dict[str, np.ndarray], shape: list[int]) -> np.ndarray:  # uint8 [n, H, W, 3]
    """Undo the predictor pixel by pixel, all images at once."""
    n, height, width, _ = shape
    residuals = unpacked(arrays["data"].tobytes(), n * 3 * height * width).reshape(n, 3, height, width)
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


def _jpeg(arrays: dict[str, np.ndarray], shape: list[int]) -> np.ndarray:  # uint8 [n, H, W, 3]
    heads = [arrays[key].tobytes() for key in ("head0", "head1")]
    ends = arrays["len"].astype(np.int64).cumsum()
    scans = arrays["scan"].tobytes()
    files = (
        (f"image {index}", heads[grey] + scans[end - length : end] + END_OF_IMAGE)
        for index, (grey, length, end) in enumerate(
            zip(arrays["grey"].tolist(), arrays["len"].tolist(), ends.tolist(), strict=True)
        )
    )
    return np.concatenate(list(pictures(files, size=(shape[2], shape[1])))).reshape(shape)


KINDS: dict[str, Any] = {"bits": _bits, "med": _median_edge, "jpeg": _jpeg}
