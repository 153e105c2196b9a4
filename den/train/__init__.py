"""Training: engine, phases, checkpoints, folders of runs, settings, the objective of the paper."""
