"""What is timed against what, in turn within one process. Results are committed as JSON under ``results/``."""
