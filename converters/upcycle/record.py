"""upcycle.json and the model card of an upcycled model."""

from __future__ import annotations

import json
from pathlib import Path

from edge_moe.converters.model_card import base_model, carried_front_matter
from edge_moe.converters.upcycle.student import UpcycleSettings
from edge_moe.converters.window_training import JudgedTraining
from edge_moe.measurement import Provenance
from edge_moe.plan import MemoryTerm
from edge_moe.units import format_bytes

RECORD_NAME = "upcycle.json"
LOG_NAME = "upcycle_log.jsonl"


class UpcycleRecord(JudgedTraining):
    """upcycle.json: what was done, and what it did on windows that only judged.

    The first of the `losses`, of step 0, is the dense model's.
    """

    provenance: Provenance
    source: str
    source_fingerprint: str
    architecture: str
    num_experts: int
    top_k: int
    settings: UpcycleSettings
    data: list[str]
    """Empty where nothing was trained."""
    window_tokens: int
    num_training_windows: int
    num_judging_windows: int
    kept_step: int
    """0: no step was better than the dense model, which is what the experts add nothing to."""
    memory_terms: list[MemoryTerm]
    total_bytes: int
    """All weight files."""
    routed_bytes: int
    """Routed experts as they are stored here."""
    packed_bytes: dict[str, int]
    """Routed experts packed without loss; empty where they are not ternary."""


def card_head(source: str, location: Path, name: str) -> tuple[str, str]:
    """(front matter and title, what the card calls the dense model) of a MoE called `name`.

    `source` is how the dense model was named, `location` its folder or file; licence and language
    are those of the card that lies there.
    """
    folder = location if location.is_dir() else location.parent
    base = base_model(source, location)
    head = (
        f"---\nbase_model: {json.dumps(base)}\n"
        f"{carried_front_matter(folder / 'README.md')}library_name: transformers\n"
        f"tags:\n- edge-moe\n- moe\n- mixture-of-experts\n---\n# {name}\n"
    )
    return head, base


def upcycle_card(record: UpcycleRecord, location: Path, name: str) -> str:
    """README.md of the folder `name`; `location` is the dense model."""
    head, base = card_head(record.source, location, name)
    first, kept = record.row(0), record.row(record.kept_step)
    kind = "ternary" if record.settings.is_ternary else "full-precision"
    lines = [
        head,
        f"{record.architecture} made of the dense model {base} with edge-moe "
        f"{record.provenance.edge_moe_version}: its feed-forward layers are shared experts, beside "
        f"which {record.num_experts} {kind} routed experts per layer "
        f"{'are learned' if first else 'add nothing yet'}, top-{record.top_k}.",
    ]
    if not first:
        lines.append("Nothing was trained: it computes what the dense model does.")
    if first and kept:
        lines.append(
            f"Trained on {', '.join(record.data)}: next-token loss on windows that were held out "
            f"{first.heldout_lm_loss:.4f} (dense) -> {kept.heldout_lm_loss:.4f} nats per token."
        )
    for form, num_bytes in record.packed_bytes.items():
        lines.append(
            f"Routed experts pack into {form} without loss: {format_bytes(num_bytes)} instead of "
            f"{format_bytes(record.routed_bytes)}."
        )
    losses = f" and losses, `{LOG_NAME}` every step" if first else ""
    lines.append(f"\n`{RECORD_NAME}` has the settings{losses}.")
    return "\n".join(lines) + "\n"
