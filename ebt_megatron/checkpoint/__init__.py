"""Writes checkpoints atomically, verifies, keeps and removes them; reads and writes weights alone as safetensors."""
