"""Make den/data/packed/fashion.npz: a balanced, seeded part of Fashion-MNIST (MIT licence, Zalando SE).

The originals are the four idx files of https://github.com/zalandoresearch/fashion-mnist, which Debian carries as
the package dataset-fashion-mnist (folder /usr/share/datasets/fashion-mnist). Every class gives the same number of
images: 1,200 of its 6,000 for training, 200 of its 1,000 for testing, drawn with numpy's PCG64 generator at seed 0
and kept in the order of the original file, so that the first images of the part hold all classes.

Layout of the file, for each split of "train" and "test":
    {split}_images  uint8 [bytes]   xz stream of the pixels, uint8 [N, 28, 28] row by row
    {split}_labels  uint8 [N]       class 0..9
    {split}_index   uint16 [N]      position in the original file
    {split}_sha256  uint8 [32]      sha256 of the pixels

The xz stream is the smallest of what was tried on these images (raw 5.2 MB, PNG sheets 5.5 MB, xz of LOCO-I
residuals 5.4 MB) and needs nothing but the standard library to read.

    python scripts/pack_fashion.py [FOLDER OF THE ORIGINALS] [OUTPUT]
"""

import gzip
import hashlib
import lzma
import os
import sys
import zlib
from pathlib import Path

import numpy as np

ORIGINALS = Path("/usr/share/datasets/fashion-mnist")
OUTPUT = Path(__file__).resolve().parent.parent / "den" / "data" / "packed" / "fashion.npz"
PER_CLASS = {"train": ("train", 1200), "test": ("t10k", 200)}
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]


def read_idx(path: Path) -> np.ndarray:
    """The array in a gzipped idx file: two zero bytes, dtype 8 (uint8), rank, big-endian sizes, values.

    Raises ValueError for a file that is damaged or of another kind.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"read_idx: {path} must be a complete gzip file, got {error}") from error
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"read_idx: {path} must be an idx file of bytes, got header {content[:3]!r}")
    rank, sizes = content[3], content[4 : 4 + 4 * content[3]]
    shape = np.frombuffer(sizes[: len(sizes) // 4 * 4], ">u4").tolist()
    values = np.frombuffer(content[4 + 4 * rank :], np.uint8)
    if len(shape) != rank or values.size != np.prod(shape, dtype=object):
        raise ValueError(f"read_idx: {path} must hold {shape} values as its header says, got {values.size}")
    return values.reshape(shape)


def balanced_index(labels: np.ndarray, per_class: int, seed: int = 0) -> np.ndarray:
    """Sorted positions of `per_class` images of every class."""
    generator = np.random.Generator(np.random.PCG64(seed))
    chosen = [generator.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def pack(originals: Path, output: Path) -> None:
    arrays = {}
    for split, (stem, per_class) in PER_CLASS.items():
        images = read_idx(originals / f"{stem}-images-idx3-ubyte.gz")
        labels = read_idx(originals / f"{stem}-labels-idx1-ubyte.gz")
        if len(images) != len(labels) or np.bincount(labels, minlength=1).min() < per_class:
            raise ValueError(
                f"pack: {originals}/{stem}-* must hold an image for each label and {per_class} of every class, got"
                f" {len(images)} images and {np.bincount(labels).tolist()} labels"
            )
        index = balanced_index(labels, per_class)
        pixels = images[index].tobytes()
        stream = lzma.compress(pixels, lzma.FORMAT_XZ, filters=XZ)
        arrays[f"{split}_images"] = np.frombuffer(stream, np.uint8)
        arrays[f"{split}_labels"] = labels[index]
        arrays[f"{split}_index"] = index.astype(np.uint16)
        arrays[f"{split}_sha256"] = np.frombuffer(hashlib.sha256(pixels).digest(), np.uint8)
        print(f"{split}: {len(index)} images, {len(stream):,} bytes, sha256 {hashlib.sha256(pixels).hexdigest()}")
    output.parent.mkdir(parents=True, exist_ok=True)
    whole = output.with_name(f".{output.stem}.npz")
    np.savez(whole, **arrays)
    os.replace(whole, output)  # half a file never has its name
    print(f"{output}: {output.stat().st_size:,} bytes")


if __name__ == "__main__":
    folder, target = (sys.argv[1:] + [ORIGINALS, OUTPUT][len(sys.argv) - 1 :])[:2]
    pack(Path(folder), Path(target))
