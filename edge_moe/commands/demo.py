"""`edge-moe demo`: the whole loop on the embedded model."""

from __future__ import annotations


def demo_command() -> None:
    """Calibrate, plan, build, run, evaluate and report on the embedded model, in minutes."""
