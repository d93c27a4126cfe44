"""Loaders over WebDataset shards, with exact, layout-free resume."""

from ebt_megatron.data.loader import Blend, Loader, MicroBatch, open_sources
from ebt_megatron.data.shards import DataError, Manifest, ShardFolder, read_manifest

__all__ = ["Blend", "DataError", "Loader", "Manifest", "MicroBatch", "ShardFolder", "open_sources", "read_manifest"]
