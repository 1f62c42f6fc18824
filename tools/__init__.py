"""What makes the repository's own data; no part of the product."""
