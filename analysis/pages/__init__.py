"""Whole pages: the report, the README's results, comparisons, speed, generation."""
