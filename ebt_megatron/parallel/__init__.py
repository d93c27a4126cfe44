"""Meets megatron-core: process groups, configuration, collectives, attributes of parameters, and the CPU backend."""
