"""Turns the real, dense SmolLM2-135M-Instruct into a Mixture-of-Experts checkpoint."""
