"""`python -m den`: the command line."""

import sys

from den.cli import main

if __name__ == "__main__":
    sys.exit(main())
