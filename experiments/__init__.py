"""Tables of the pruning papers as Python objects, and the code that runs their cells."""
