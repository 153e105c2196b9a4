"""Folders for decoded sets, and the fingerprint of the files that a set was decoded from."""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

FORMAT = 2  # of the entries and of the decoding: another number makes every set be decoded anew


def fingerprint(files: Iterable[Path], root: Path) -> str:
    """16 hexadecimal digits that change with the name, size or times of any of the files; hidden ones do not count.

    Folders stand for all files in them.

    The time of the last change of a file's state is among them: it cannot be set back, as that of its content can.
    Names are relative to `root`, which may be moved. Raises ValueError for folders that cannot be read.
    """
    digest = hashlib.sha256(str(FORMAT).encode())
    try:
        for path in files:
            for line in _states(path, os.path.relpath(path, root)):
                digest.update(os.fsencode(line))
    except OSError as error:
        raise ValueError(f"load_set: files in {root} must be readable, got {error}") from error
    return digest.hexdigest()[:16]


def _states(place: Path | os.DirEntry[str], name: str) -> Iterator[str]:
    """A line for each file, in the order of the names; a set of 100,000 takes about a second."""
    try:
        state = place.stat()
    except FileNotFoundError:  # to be told by the decoding, which knows what it lacks
        yield f"{name} missing\n"
        return
    if not stat.S_ISDIR(state.st_mode):
        yield f"{name}\0{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}\n"
        return
    yield f"{name}/\n"
    with os.scandir(place) as entries:
        own = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in own:
        yield from _states(entry, f"{name}/{entry.name}")


def homes(own: Path) -> list[tuple[Path, str]]:
    """The folders that may hold entries, each with the prefix of its entries' names; new ones go to the last folder.

    The first is `own`, in the data root; a root without write permission is left alone, even by a user who could write
    to it, for the user's cache folder. Raises ValueError when neither can be written.
    """
    root = own.parent
    found = [(own, "")]
    if not _writable(own if own.is_dir() else root):
        import pooch

        found.append((Path(pooch.os_cache("den")), f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8]}-"))
    try:
        found[-1][0].mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"load_set: {found[-1][0]} must be a folder that can be written, got {error}") from error
    return found


def _writable(folder: Path) -> bool:
    return bool(folder.stat().st_mode & stat.S_IWUSR) and os.access(folder, os.W_OK)
