"""Ray: the session, its resources, its actors."""
