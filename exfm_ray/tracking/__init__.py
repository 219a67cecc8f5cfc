"""What a run reports: metrics, progress, wandb, pages."""
