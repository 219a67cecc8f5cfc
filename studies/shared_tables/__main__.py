"""Runs the study of shared tables: python -m studies.shared_tables."""

from studies.shared_tables.run import main

if __name__ == "__main__":
    main()
