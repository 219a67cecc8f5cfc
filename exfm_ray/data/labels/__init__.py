"""Labels that arrive after their events."""
