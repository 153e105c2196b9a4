"""Reports of runs of `den dag train`: tables, drawings of the graphs, and what does not hold."""
