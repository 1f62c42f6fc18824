"""What comes from outside, looked at before any work: values, names, methods and model folders of one's own."""
