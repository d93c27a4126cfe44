"""Trains: the step, the run, the loop and its hooks, the optimizer, metrics and faults."""
