"""Tests of ebt_megatron.parallel."""
