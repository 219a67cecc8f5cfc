"""Sweeps over the settings of the vertical models: search spaces, trials, Ray Tune, their
analysis."""
