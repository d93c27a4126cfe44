"""Has the networks: layers, the energy models of sequences, pictures and puzzles, and their baselines."""
