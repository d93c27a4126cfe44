"""The optimisation over predictions: propose, learn, the replay buffer, inference."""
