"""Runs on clusters: a client of Ray's job server, and the files that start a cluster."""
