"""What `python -m benchmarks.gpu_validate` runs in the first hour on a GPU: checks, and speeds."""
