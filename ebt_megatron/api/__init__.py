"""Trained models in Python: `ebt_megatron.load`, and what a model of each modality can do."""
