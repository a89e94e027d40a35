"""Checkpoint in, statistics or a smaller checkpoint out."""
