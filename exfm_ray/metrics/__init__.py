"""Metrics of a model on examples it has not learned: additive state, and comparisons of figures."""
