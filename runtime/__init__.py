"""Run a package under a memory budget."""
