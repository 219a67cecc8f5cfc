"""The ablation study: which part of the distillation helps, and which does not."""
