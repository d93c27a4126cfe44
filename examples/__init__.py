"""Worked examples: `python -m examples.NAME --help` in a checkout. Not installed."""
