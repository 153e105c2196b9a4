"""Decoded once: the pixels of a set as a memory-mapped file beside its data root."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from den.progress import Progress

FOLDER = "den-cache"


@dataclass(frozen=True)
class Pixels:
    """A split: its labels at once, its pixels in parts, as they are decoded."""

    shape: tuple[int, ...]  # (N, H, W, 3)
    labels: dict[str, np.ndarray]  # by kind of label: whole numbers [N]
    parts: Iterable[np.ndarray]  # uint8 [n, H, W, 3], N images in all


@dataclass(frozen=True)
class Found:
    """A split in a data root: the files that it comes from, and how they are decoded."""

    files: tuple[Path, ...]
    decode: Callable[[], Pixels]


def stored(found: Found, root: Path, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Images uint8 [N, 3, H, W], channels-last in memory, and labels int64 [N] of each kind.

    The first time they are decoded into ROOT/den-cache (where the root is not to be written, into the user's cache
    folder), later they are mapped from there.  A file that has changed since is decoded anew.  An interruption leaves
    nothing behind: a folder gets its name when it is complete.

    Raises ValueError for files that cannot be decoded.
    """
    entry = _home(root) / f"{name}-{_fingerprint(found.files)}"
    if not entry.is_dir():
        with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".", ignore_cleanup_errors=True) as folder:
            _write(found.decode(), Path(folder) / "set", name)
            try:
                os.rename(Path(folder) / "set", entry)
            except OSError:
                if not entry.is_dir():  # else another process was faster
                    raise
    pixels = np.load(entry / "images.npy", mmap_mode="c")
    with np.load(entry / "labels.npz") as labels:
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), {key: torch.from_numpy(labels[key]) for key in labels}


def _write(pixels: Pixels, folder: Path, name: str) -> None:
    folder.mkdir()
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, pixels.shape)
    done = 0
    with Progress(len(images), f"decode {name}", unit="image", leave=False) as bar:
        for part in pixels.parts:
            images[done : done + len(part)] = part
            done += len(part)
            bar.update(len(part))
    if done != len(images):
        raise ValueError(f"load_set: {name} must have {len(images)} images, got {done}")
    images.flush()
    np.savez(folder / "labels.npz", **{key: values.astype(np.int64) for key, values in pixels.labels.items()})


def _fingerprint(files: Iterable[Path]) -> str:
    """Changes with the place, size or time of a file."""
    text = [f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def _home(root: Path) -> Path:
    """Where decoded sets go.  A folder without write permission is left alone, even by a user who could write to it."""
    home = root / FOLDER
    place = home if home.is_dir() else root
    if not (place.stat().st_mode & stat.S_IWUSR and os.access(place, os.W_OK)):
        import pooch

        home = Path(pooch.os_cache("den"))
    home.mkdir(parents=True, exist_ok=True)
    return home
