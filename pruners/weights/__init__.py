"""Offloaded weights: where a model's weights are kept while not in use, and how they are loaded part by part."""
