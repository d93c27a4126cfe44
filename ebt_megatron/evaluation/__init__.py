"""Perplexity against thinking, generation, uncertainty and reports."""
