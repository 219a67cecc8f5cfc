"""Students as they are served: one graph from table rows to probabilities, in files that need
nothing of this project."""
