"""Folders that one process makes and others read, without a trace of those that were killed.

All locks are flock's: the kernel frees them when their process ends, however it ends. A system without flock is as a
file system without locks: every process makes a folder of its own, and none is removed.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"


def shared(file: BinaryIO, path: Path) -> None:
    """Lock an open file against removal; FileNotFoundError when it has been removed from `path` meanwhile."""
    with suppress(OSError):  # a file system without locks, where nothing is removed
        _flock(file.fileno(), "SH")
    _must_be(file.fileno(), path)


@contextmanager
def claimed(entry: Path) -> Iterator[Path]:
    """A hidden folder beside `entry` for this process alone, removed afterwards; waits while another has it."""
    folder = entry.with_name(f".{entry.name}")
    lock = None
    while lock is None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = _acquired(folder / LOCK)
        except FileNotFoundError:  # just removed: make it again
            continue
        except OSError:  # a file system without locks
            shutil.rmtree(folder, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=entry.parent))
            break
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def clear(entry: Path, files: Sequence[str]) -> None:
    """Remove from beside `entry` what nobody holds a lock on: what killed processes left, entries of its name before.

    files: what an entry consists of, of which the first carries the lock of readers. Of hidden folders only those
    are removed that hold nothing but these.
    """
    name = entry.name.rpartition("-")[0]
    before = re.compile(rf"{re.escape(name)}-[0-9a-f]{{16}}")
    for path in entry.parent.iterdir():
        unfinished = path.name.startswith(".") and _holds_only(path, {LOCK, *files})
        if not unfinished and not (before.fullmatch(path.name) and path != entry):
            continue
        lock = LOCK if unfinished else files[0]
        with suppress(OSError):  # held, or no locks here
            descriptor = _acquired(path / lock, wait=False)
            try:
                shutil.rmtree(path)
            finally:
                os.close(descriptor)


def _holds_only(folder: Path, names: set[str]) -> bool:
    return folder.is_dir() and all(names.issuperset(files) for _, _, files in os.walk(folder))


def _flock(descriptor: int, kind: Literal["SH", "EX"], wait: bool = True) -> None:
    """Lock an open file; raises OSError where it cannot be locked or, with wait=False, is locked already."""
    if fcntl is None:
        raise OSError("this system has no flock")
    how: int = getattr(fcntl, f"LOCK_{kind}")
    fcntl.flock(descriptor, how if wait else how | fcntl.LOCK_NB)


def _acquired(path: Path, wait: bool = True) -> int:
    """Descriptor of `path`, made where it is missing, with the lock; OSError when that is held or cannot be had."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _flock(descriptor, "EX", wait)
        _must_be(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _must_be(descriptor: int, path: Path) -> None:
    """FileNotFoundError when `path` no longer leads to the file of the descriptor."""
    if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
        raise FileNotFoundError(path)
