"""Ray for a run: the session, CPUs and nodes, calls to actors, memory."""
