"""Files, local and remote: atomic writes, copies, locks."""
