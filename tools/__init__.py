"""Commands on data and runs: shards, plans, conversion, pictures. setup.py installs them."""
