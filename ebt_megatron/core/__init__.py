"""What stands below everything: errors, the command lines' shared behaviour, launchers, randomness."""
