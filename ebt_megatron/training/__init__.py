"""The training loop, optimizer, checkpoints, metrics and fault handling."""
