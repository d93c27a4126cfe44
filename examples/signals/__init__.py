"""A kind of sample of one's own: see docs/extending.md."""
