"""Trained runs: opened, measured, and steered towards a budget."""
