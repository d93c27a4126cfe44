"""A modality of one's own, in one module: see docs/extending.md."""
