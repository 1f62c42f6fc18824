"""Requests that begin alike in one sequence, and the models that score them there as they would alone."""
