"""Loaders over WebDataset shards, with exact, layout-free resume."""
