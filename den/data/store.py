"""Decoded once: the pixels of a set as a memory-mapped file beside its data root.

    ROOT/den-cache/NAME-FINGERPRINT/images.npy, labels.npz   a whole entry; readers hold a shared lock on images.npy
    ROOT/den-cache/.NAME-FINGERPRINT/lock, set/...           one that is being made, by the process that holds the lock

Locks are the kernel's, so those of a killed process are free at once. On a file system without locks every process
makes an entry of its own, the first to end gives it its name, and nothing is cleared.
"""

import errno
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from den.data.locks import claimed, clear, shared
from den.data.places import fingerprint, homes
from den.support.progress import Progress

FOLDER = "den-cache"
IMAGES, LABELS = "images.npy", "labels.npz"
WRITTEN = "images.written"  # in labels.npz beside the labels: when images.npy was last changed, in seconds


@dataclass(frozen=True)
class Pixels:
    """A split: its labels at once, its pixels in parts, as they are decoded."""

    shape: tuple[int, ...]  # (N, H, W, 3)
    labels: dict[str, np.ndarray]  # by kind of label: whole numbers [N]
    parts: Iterable[np.ndarray]  # uint8 [n, H, W, 3], N images in all


@dataclass(frozen=True)
class Found:
    """A split in a data root: the files that it comes from, and how they are decoded."""

    files: tuple[Path, ...]  # and folders, with all that lies in them
    decode: Callable[[], Pixels]


def stored(found: Found, root: Path, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Images uint8 [N, 3, H, W], channels-last in memory, and labels int64 [N] of each kind.

    The first time they are decoded into ROOT/den-cache (where the root is not to be written, into the user's cache
    folder), later they are mapped from there. They are decoded anew when any of the files has changed, come or gone
    since, or when what was decoded is damaged. Entries of before and what killed processes left are removed; an
    interruption leaves nothing behind.

    Raises ValueError for files that cannot be decoded or change meanwhile, and where there is no room.
    """
    key = fingerprint(found.files, root)
    entries = [home / f"{prefix}{name}-{key}" for home, prefix in homes(root / FOLDER)]
    clear(entries[-1], (IMAGES, LABELS))
    for entry in entries:
        if whole := _opened(entry):
            return whole
    try:
        whole = _decoded(found, root, name, key, entries[-1])
    except OSError as error:
        raise ValueError(
            f"load_set: {entries[-1].parent} must take the decoded images of {name}, got {error}"
        ) from error
    if whole is None:
        raise ValueError(f"load_set: {entries[-1]} must be readable once it is written, got other files")
    return whole


def _decoded(found: Found, root: Path, name: str, key: str, entry: Path) -> tuple[Tensor, dict[str, Tensor]] | None:
    """Decode a split into `entry` and open it there, as `_opened`."""
    with claimed(entry) as folder:
        if whole := _opened(entry):  # made by another process while this one waited
            return whole
        _write(found.decode(), folder / "set", name)
        if fingerprint(found.files, root) != key:
            raise ValueError(f"load_set: files of {name} in {root} must not change while they are decoded; try again")
        shutil.rmtree(entry, ignore_errors=True)  # what is there is damaged
        os.rename(folder / "set", entry)
        return _opened(entry)


def _opened(entry: Path) -> tuple[Tensor, dict[str, Tensor]] | None:
    """Images uint8 [N, 3, H, W], mapped, and labels int64 [N] of an entry; None where there is no whole one.

    The mapping keeps a duplicate of the descriptor, and with it the lock, as long as the images are in use.
    """
    try:
        with (entry / IMAGES).open("rb") as file:
            shared(file, entry / IMAGES)
            if np.lib.format.read_magic(file) != (1, 0):
                return None
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            state, offset = os.fstat(file.fileno()), file.tell()
            with np.load(entry / LABELS, allow_pickle=False) as arrays:
                labels = {kind: arrays[kind] for kind in arrays.files}
            as_written = int(labels.pop(WRITTEN)) == int(state.st_mtime) and dtype == np.uint8 and len(shape) == 4
            fits = state.st_size == offset + math.prod(shape) and all(
                each.shape == shape[:1] for each in labels.values()
            )
            if not (as_written and fits):
                return None
            pixels = np.memmap(file, np.uint8, "c", offset, shape)
    except Exception:  # whatever is wrong with it, it is decoded anew
        return None
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), {kind: torch.from_numpy(each) for kind, each in labels.items()}


def _write(pixels: Pixels, folder: Path, name: str) -> None:
    """Write an entry through the file, not through a mapping, in which a full disk would be a SIGBUS."""
    folder.mkdir()
    count, *size = pixels.shape
    if count == 0:
        raise ValueError(f"load_set: {name} must hold at least one image, got an empty data set")
    with (folder / IMAGES).open("wb") as file, Progress(count, f"decode {name}", unit="image", leave=False) as bar:
        header = {"descr": "|u1", "fortran_order": False, "shape": tuple(pixels.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        _reserve(file, math.prod(pixels.shape))
        done = 0
        for part in pixels.parts:
            if part.dtype != np.uint8 or list(part.shape[1:]) != size:
                raise ValueError(
                    f"load_set: {name} must have images uint8 {size}, got {part.dtype} {list(part.shape[1:])}"
                )
            file.write(np.ascontiguousarray(part).data)
            done += len(part)
            bar.update(len(part))
        if done != count:
            raise ValueError(f"load_set: {name} must have {count} images, got {done}")
        file.flush()
        os.fsync(file.fileno())  # or a power cut leaves zeros under a name that says whole
    written = int(time.time()) // 2 * 2 - 10  # even, as some file systems keep times, and before any later change
    os.utime(folder / IMAGES, (written, written))
    arrays: dict[str, Any] = {kind: values.astype(np.int64) for kind, values in pixels.labels.items()}
    np.savez(folder / LABELS, **arrays | {WRITTEN: np.int64(written)})


def _reserve(file: BinaryIO, size: int) -> None:
    """Reserve `size` more bytes, so that a full disk is reported before hours of decoding: OSError."""
    try:
        os.posix_fallocate(file.fileno(), file.tell(), size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(error.errno, f"{error.strerror} ({size / 1e6:,.0f} MB are needed)") from error
        # a file system that cannot reserve: writing will tell
