"""Measures models: perplexity, zero-shot tasks, efficiency, generation.  Knows tokens and models, no pruners."""
