"""Local and remote files: atomic writes, local copies, locks."""
