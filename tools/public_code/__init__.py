"""Checkpoints of the paper's public code (github.com/alexiglad/EBT), for `tools.import_ebt_checkpoint`."""
