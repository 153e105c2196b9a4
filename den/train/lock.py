"""Lock that lets one process at a time train in a run's folder."""

import contextlib
import errno
import os
import socket
import warnings
from io import FileIO
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: runs are not guarded there
    fcntl = None  # type: ignore[assignment]

NAME = "den.lock"  # the file in the folder; while its holder lives, the system keeps it locked


class RunLock:
    """Holds the folder of a run from the moment that it is made until `release` or the end of the process.

    The system gives a lock back when its holder ends, however it ends: a file that a killed process has left is no
    lock.  The folder must be there.  Reading a run needs no lock.

    Raises ValueError that names the holder, where there is one, and OSError where the folder cannot be written.
    Warns on a file system that has no locks.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._file = self._acquire()

    def release(self) -> None:
        """Give the folder back."""
        self.path.unlink(missing_ok=True)  # while it is still locked: who opens it now sees that it is gone
        self._file.close()

    def _acquire(self) -> FileIO:
        while True:
            file = open(self.path, "ab+", buffering=0)  # noqa: SIM115 (its life is that of the lock)
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = _holder(file)
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    warnings.warn(
                        f"{self.path} cannot be locked ({error}): let no second process train there", stacklevel=2
                    )
                    return file
                file.close()
                raise ValueError(
                    f"train: out must be a folder that no other process trains in, got {self.path.parent}, in use by"
                    f" {holder} (wait for it, end it, or choose another --out)"
                ) from error
            if self._is_current(file):
                with contextlib.suppress(OSError):  # a full disk: locked all the same
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
                return file
            file.close()  # its holder released it in between

    def _is_current(self, file: FileIO) -> bool:
        """True where the name still leads to the file that was locked."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        return False


def _holder(file: FileIO) -> str:
    file.seek(0)
    return file.read().decode(errors="replace").strip() or "another process"
