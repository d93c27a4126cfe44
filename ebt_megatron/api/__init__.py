"""Gives trained models to Python code: `ebt_megatron.load`, and a class for each modality's models."""
