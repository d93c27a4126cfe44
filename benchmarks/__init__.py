"""Benchmarks: `python -m benchmarks.NAME --help` in a checkout; results are in `results/`. Not installed."""
