"""Raw data into an event stream."""
