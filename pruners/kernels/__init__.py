"""Kernels for GPUs, each with a plain form beside it that says what is right."""
