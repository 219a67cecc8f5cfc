"""Speed and robustness. Each benchmark is a command: python -m benchmarks.NAME."""
