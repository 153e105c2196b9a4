"""The entry point of the command line.  The commands are in `den.commands`, which is imported within."""

import sys
from collections.abc import Sequence

try:
    from den.support.terminal import ended, interrupts_end_the_process, terminations
except KeyboardInterrupt:  # before there is anything that could tell it better
    print("den: interrupted", file=sys.stderr)
    raise SystemExit(130) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0, or 2 after wrong input (told in one line), 130 after an interrupt, 143 after SIGTERM, 141 where nobody reads the
    output any more.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)

    def run() -> int:
        with interrupts_end_the_process():
            from den.commands import command

            prepared = command(words)
        with terminations():
            return prepared()

    resumable = "; continue with the same command and --resume --out FOLDER" if "train" in words[:2] else ""
    return ended(run, f"interrupted{resumable}")


if __name__ == "__main__":
    sys.exit(main())
