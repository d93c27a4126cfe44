"""Megatron bring-up, the CPU backend, pipeline sweeps and layout-free randomness."""
