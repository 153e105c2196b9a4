"""The entry point of the command line.  The commands are in `den.commands`, which is imported within."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from den.terminal import INTERRUPTED, UNREAD, WRONG, complain, interrupts_end_the_process, standard_streams


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0, or 2 after wrong input (told in one line), 130 after an interrupt, 141 where nobody reads the output any more.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with standard_streams():
            with interrupts_end_the_process():
                from den.commands import command

                run = command(arguments)
            return run()
    except BrokenPipeError:
        return UNREAD
    except (ValueError, OSError) as error:
        complain(f"error: {error}")
        return WRONG
    except KeyboardInterrupt:
        training = "train" in arguments[:2]
        complain("interrupted" + "; continue with the same command and --resume --out FOLDER" * training)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
