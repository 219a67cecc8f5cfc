"""exfm-ray: external foundation-model distillation (ExFM) for ads and recommendation, on Ray."""

__version__ = "0.1.0"
