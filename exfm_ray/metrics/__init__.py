"""Figures of a model over the examples it has not learned: summable state, and comparisons of
figures."""
