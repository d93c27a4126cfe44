"""Raw text, video and images to WebDataset shards: `ebt-prepare --help`."""
