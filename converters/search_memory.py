"""What measuring plans needs in memory, before it starts. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.calibration_memory import READ_BYTES_PER_WEIGHT, calibration_terms
from edge_moe.formats import DROP, expert_bytes
from edge_moe.metrics import CHUNK_VALUES
from edge_moe.plan import MemoryTerm, formula_terms

PACKED_LIMIT_BYTES = 2 * 2**30
"""Packed experts that are kept between passes."""
BATCH_TOKENS = 2048
"""Windows of equal length run together up to this many tokens."""
NO_SEARCH = "use --no-search, which measures nothing, or a machine with more memory"


def search_terms(
    checkpoint: Checkpoint, window_lengths: Sequence[int], forms: Sequence[str], num_variants: int
) -> list[MemoryTerm]:
    """Upper bounds of what `VariantScorer` adds to a process that has imported torch, by term.

    `num_variants` plans of `forms` run through the layers together. What packing by calibration
    text takes comes on top: `CalibratedPacker.memory_terms`.

    layer            as for calibration
    variant experts  4 bytes x E 3HI, the layer's experts as one variant stores them
    packed experts   every expert in every form, or the limit up to which they are kept
    hidden states    4 H bytes per token, variant, whole model and reference, before and after a
                     layer
    head             V H while it is read, and logits: 2^21 values of 4 + 6 x 8 bytes
    window, scratch, allowance: as for calibration, a batch of windows at a time
    """
    spec = checkpoint.spec
    num_tokens, longest = sum(window_lengths), max(window_lengths)
    batch_tokens = max(longest, min(BATCH_TOKENS, num_tokens))
    calibration = {
        term.name: term.num_bytes
        for term in calibration_terms(checkpoint, num_tokens, batch_tokens)
    }
    scores = 8 * spec.num_attention_heads  # bytes per pair of tokens of one window
    window = calibration["window"] - scores * batch_tokens * (batch_tokens - longest)
    packed = sum(expert_bytes(form, *spec.expert_shape) for form in forms if form != DROP)
    states = 2 * (num_variants + 2) * num_tokens * 4 * spec.hidden_size
    head_weights = spec.vocab_size * spec.hidden_size
    terms = {
        "layer": calibration["layer"],
        "variant experts": 4 * spec.num_experts * spec.expert_weights,
        "packed experts": min(PACKED_LIMIT_BYTES, spec.num_moe_layers * spec.num_experts * packed),
        "hidden states": states,
        "head": READ_BYTES_PER_WEIGHT * head_weights + CHUNK_VALUES * 52,
        "window": window,
        "scratch": calibration["scratch"],
        "allowance": calibration["allowance"],
    }
    return formula_terms(terms)
