"""Kinds of sample, shards, the global order, remote folders, and the loader, which resumes exactly on any layout."""
