"""The study of shared tables: what the FM's rows and representations bring to vertical models."""
