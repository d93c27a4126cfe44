"""Command-line tools: `python -m tools.NAME --help` in a checkout; setup.py installs them as ebt_megatron.tools.

So that they work under both names, modules here import each other relatively.
"""
