"""The state that thinking improves: its interface, and one module per kind of state."""
