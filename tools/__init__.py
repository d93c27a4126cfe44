"""Command-line tools for prepared data, plans and weights; setup.py installs their commands."""
