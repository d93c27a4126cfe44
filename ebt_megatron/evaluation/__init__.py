"""Evaluates runs: at every number of steps, by the suites of text, pictures and puzzles, and in reports."""
