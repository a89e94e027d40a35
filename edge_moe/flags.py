"""How options are typed, for messages about what functions and settings call otherwise."""

from __future__ import annotations

from collections.abc import Mapping

SHORT = {"learning_rate": "lr", "batch_windows": "batch"}
"""Names that `edge-moe upcycle` has shorter."""


def flag(name: str, typed: Mapping[str, str] = SHORT) -> str:
    """`kl_weight` -> `--kl-weight`; `typed` has those that are called otherwise."""
    return f"--{typed.get(name, name).replace('_', '-')}"
