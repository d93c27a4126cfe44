"""Validation, the evaluation suites of text and pictures, their statistics and figures, and the report."""
