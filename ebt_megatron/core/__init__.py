"""Serves every package and needs none: errors, command lines, launchers, randomness, whole files, options, timers."""
