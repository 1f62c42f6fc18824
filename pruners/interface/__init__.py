"""User input, checked before any work: values, names, methods and model folders of your own."""
