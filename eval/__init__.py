"""Measures models: perplexity, zero-shot tasks, efficiency, generation. It knows tokens and models, no pruners."""
