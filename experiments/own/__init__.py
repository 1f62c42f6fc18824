"""Your own models, methods and tables, from outside the repository."""
