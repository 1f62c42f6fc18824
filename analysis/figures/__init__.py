"""Figures of results; each kind is registered once."""
