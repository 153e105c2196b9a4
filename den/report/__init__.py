"""Reports of runs: tables 2 to 5 of the paper with ours beside its numbers, figures, and what does not hold."""
