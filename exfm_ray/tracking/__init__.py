"""What a run tells: metrics, progress, reports."""
