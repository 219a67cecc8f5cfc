"""Raw data sets: where events come from, and what their columns mean."""
