"""Benchmarks: ``pytest benchmarks/ --benchmark-only`` takes times, ``python -m benchmarks.report`` keeps them."""
