"""Tests of ebt_megatron.training."""
