"""Ablations: what distillation brings. Each one is a command: python -m studies.NAME."""
