"""Checkpoints of the paper's public code (github.com/alexiglad/EBT), for `ebt_megatron.tools.import_ebt_checkpoint`."""
