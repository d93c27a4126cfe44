"""What every package may use: errors, command lines, launchers, randomness, whole files, options, timers."""
