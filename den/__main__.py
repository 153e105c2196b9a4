"""`python -m den`: the command line."""

import sys

from den.cli import main

sys.exit(main())
