"""Students for serving: one graph from table rows to probabilities, in files that need no code of
this project."""
