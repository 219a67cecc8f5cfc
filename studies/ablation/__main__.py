"""Runs the ablation study: python -m studies.ablation."""

from studies.ablation.run import main

if __name__ == "__main__":
    main()
