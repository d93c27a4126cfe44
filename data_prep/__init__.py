"""Raw text, video and images to WebDataset shards: `ebt-prepare --help`, or in a checkout `python -m data_prep.text`.

setup.py installs this as ebt_megatron.data_prep. So that it works under both names, modules here import each
other relatively.
"""
