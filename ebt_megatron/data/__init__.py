"""Reads shards: kinds of sample, the global order, remote folders, and a loader that resumes exactly on any layout."""
