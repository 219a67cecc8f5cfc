"""The settings of a run: typed, frozen, read from one YAML file."""
