"""Shards, the global order of samples, remote folders and the loader, which resumes exactly on any layout."""
