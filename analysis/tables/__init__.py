"""Tables of results, as frames, grids, Markdown and LaTeX, with their notes."""
