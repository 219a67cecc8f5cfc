"""The event stream: raw data to windows on disk (`prepare`), windows on disk (`stream`), windows to
batches (`feed`)."""
