"""Sweeps over the settings of the vertical models: spaces, trials, Ray Tune, analysis."""
