"""Sends a table's cells to a cluster: the same runs as `python -m experiments run`, as Slurm jobs."""
