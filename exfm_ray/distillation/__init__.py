"""What a student learns from: labels, plain distillation, auxiliary head, student adapter (ExFM,
arXiv 2502.17494)."""
