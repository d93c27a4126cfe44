"""Turns raw text, video, pictures and puzzles into WebDataset shards: `ebt-prepare --help`."""
