"""Holds the predictions that thinking improves: their interface, and a module for each kind."""
