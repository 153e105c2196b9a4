"""Measurements of trained networks: accuracy, time, operating points, comparison with a dense network."""
