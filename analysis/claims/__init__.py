"""The papers' claims as predicates over numbers, and their verdicts."""
