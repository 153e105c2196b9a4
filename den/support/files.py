"""Files that a command writes: UTF-8 whatever the locale, whole or not at all, and places checked before long work."""

import errno
import os
import stat
import tempfile
from pathlib import Path

PARTIAL = ".partial"  # ends the name of a file that is being written


def write_whole(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file so that `path` holds what it held before or `content`, never a part, whatever ends the process.

    The file is written under the name "{path}.partial" and renamed.  sync: wait until the disk has it, so that a power
    cut leaves one of the two as well.  OSError when it cannot be written.
    """
    temporary = path.with_name(path.name + PARTIAL)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's names, on file systems that can be asked to."""
    if not hasattr(os, "O_DIRECTORY"):  # no POSIX system: folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, as `write_whole` does.

    Bytes of file names that the locale could not decode are written as they are where they are UTF-8, else as U+FFFD.
    """
    content = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode("utf-8")
    write_whole(path, content, sync=False)


def is_writable(folder: Path) -> bool:
    """Return True where a file could be made in the folder, found out by making one.

    A folder without write permission counts as not writable, even for a user who could write to it.
    """
    try:
        if not folder.stat().st_mode & stat.S_IWUSR:
            return False
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def check_folder(folder: Path, what: str) -> None:
    """Make a folder that is to be written to, with those above it.

    Raises:
        ValueError: it cannot be made or written to; `what`: the option, as "report: out".
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{what} must be a folder that can be written, got {folder}: {error}") from error
    if not is_writable(folder):
        raise ValueError(f"{what} must be a folder that can be written, got {folder}")


def check_own(path: Path, mark: str, what: str) -> None:
    """Raise ValueError for a file that would be replaced and is not ours: `mark` stands in every one that is."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ValueError(f"{what} must be a folder that can be written, got {path}: {error}") from error
    if mark.encode() not in content:
        raise ValueError(f"{what} must be a folder without {path.name} of another program, got {path} (choose another)")


def check_file(path: Path, what: str) -> None:
    """Make the folder of a file that is to be written; ValueError, as `check_folder`, where it could not be."""
    check_folder(path.parent, what)
    if path.is_dir():
        raise ValueError(f"{what} must be a file, got {path}, which is a folder")
