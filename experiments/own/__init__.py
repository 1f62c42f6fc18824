"""A bench of one's own: models, methods and tables from outside the repository."""
