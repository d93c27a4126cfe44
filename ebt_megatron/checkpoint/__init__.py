"""Checkpoints: written atomically, verified, kept or removed; and weights alone as safetensors."""
