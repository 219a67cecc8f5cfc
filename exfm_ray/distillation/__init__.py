"""What a student learns from: labels, plain distillation, auxiliary head, student adapter.

All arms are those of ExFM (arXiv 2502.17494).
"""
