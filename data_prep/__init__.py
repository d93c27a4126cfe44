"""Preparation of raw text, video and images as WebDataset shards: `ebt-prepare --help`."""
