"""What a training would need, computed before it starts."""
