"""Raw text to WebDataset shards: run as `python -m data_prep.text --help`."""
