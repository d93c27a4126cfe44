"""A run at every number of steps, the suites of text and pictures, and a report for each modality."""
