"""The standard streams of a command, and how its process ends: nothing that they are connected to can break its work.

Light to import: an interrupt while the rest is imported must find this ready.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from den.support import launched

TYPE_CHECKING = False  # typing takes a third of the time that importing this takes
if TYPE_CHECKING:
    from typing import Any

WRONG, INTERRUPTED, UNREAD, TERMINATED = 2, 130, 141, 143  # exit statuses; the last three are those of the signals
PLAIN = {"±": "+-", "Δ": "delta", "≥": ">=", "≤": "<=", "²": "^2", "×": "x", "µ": "u"}  # noqa: RUF001


class Terminated(BaseException):
    """Raised where a command is when SIGTERM asks it to end, so that it gives back what it holds."""


def complain(text: str) -> None:
    """Write one line to stderr, if anybody takes it; of several processes of a run with the number of this one."""
    number = launched.rank()
    who = f"den (process {number}):" if number else "den:"
    with contextlib.suppress(OSError, ValueError):  # a full disk, a closed file
        print(who, *text.split(), file=sys.stderr, flush=True)


def ended(run: Callable[[], int], interrupted: str = "interrupted") -> int:
    """The exit status of a command: what `run` returns, or 2 after wrong input (told in one line), 130 after an
    interrupt, 143 after SIGTERM, 141 where nobody reads the output any more.

    An error with a true attribute `told` is told by another process."""
    try:
        with standard_streams():
            return run()
    except BrokenPipeError:
        return UNREAD
    except (ValueError, OSError) as error:
        if not getattr(error, "told", False):
            complain(f"error: {error}")
        return WRONG
    except KeyboardInterrupt:
        complain(interrupted)
        return INTERRUPTED
    except Terminated:
        complain(interrupted.replace("interrupted", "ended by SIGTERM"))
        return TERMINATED


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Streams that can be written to.

    What the caller has closed is the null device: else the next file that is opened would get its number, and whatever
    is printed there. Characters that stdout cannot encode are spelt in ASCII. On leaving, what was printed is
    written; BrokenPipeError where nobody reads it any more.
    """
    _open_closed_files()
    errors = getattr(sys.stdout, "errors", None)
    _encode(sys.stdout, "den.spelt" if errors == "strict" or errors == "surrogateescape" else errors)
    try:
        yield
    finally:
        try:
            _flush(sys.stdout)
        finally:
            _encode(sys.stdout, errors)


@contextlib.contextmanager
def interrupts_end_the_process() -> Iterator[None]:
    """Let an interrupt end the process at once, in one line: for imports, where an exception could end up anywhere and
    there is nothing to be lost."""
    if threading.current_thread() is not threading.main_thread() or _handler() is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def terminations() -> Iterator[None]:
    """Let SIGTERM raise `Terminated`; the next one ends the process.  Nothing changes where SIGTERM is handled."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated


def _handler() -> Any:
    return signal.getsignal(signal.SIGINT)


def _end(*_: object) -> None:
    complain("interrupted")
    os._exit(INTERRUPTED)


def _open_closed_files() -> None:
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (for as long as the process)


def _encode(stream: Any, errors: str | None) -> None:
    """Set how a stream treats characters that it cannot encode, where it can be set."""
    if errors is not None and errors != stream.errors and hasattr(stream, "reconfigure"):
        with contextlib.suppress(OSError, ValueError):
            stream.reconfigure(errors=errors)


def _flush(stream: Any) -> None:
    try:
        stream.flush()
    except ValueError:  # closed by somebody
        return
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # else the interpreter would try again at its end, and tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: the characters in ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(character, "?") for character in error.object[error.start : error.end]), error.end


codecs.register_error("den.spelt", _spell)
