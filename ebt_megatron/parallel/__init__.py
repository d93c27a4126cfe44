"""Megatron's process groups and configuration, collectives, its attributes of parameters, and the CPU backend."""
