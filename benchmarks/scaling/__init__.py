"""A scaling study: who scales faster, by how much, with what interval, over one axis of training (docs/scaling.md).

    python -m benchmarks.scaling benchmarks/studies/data.yaml --dry-run     # the plan, its cost, and what it can tell
    python -m benchmarks.scaling benchmarks/studies/data.yaml --workers 2   # trains what is missing, then fits
    python -m benchmarks.scaling benchmarks/studies/data.yaml --slurm       # submits what is missing as arrays

Every run decays to its own end. A run that is done is not repeated, one that was stopped goes on, and one that fails is
tried once more. `plan` says which runs there are, `runs` and `slurm` do them, `report` fits and shows them.
"""
