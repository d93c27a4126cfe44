"""Command-line tools: run each as `python -m tools.NAME --help`."""
