"""Where a model's weights are while nobody uses them, and how they come and go part by part."""
