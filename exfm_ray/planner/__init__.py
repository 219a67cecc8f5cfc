"""Memory and compute that a training would need, calculated before it starts."""
