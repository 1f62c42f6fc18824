"""Texts and documents: calibration corpora, tokens, evaluation tasks, where each comes from."""
