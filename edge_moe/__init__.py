"""edge-moe: fit a Mixture-of-Experts model into a memory budget, run it there, show every byte."""

__version__ = "0.1.0"
