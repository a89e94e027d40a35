"""What a transform needs in memory, before it starts. No torch.

It holds one decoder layer, the layer's new experts and what the layer was given, never the model.
Statistics or gradients that have to be measured first state what they need when they begin.
"""

from __future__ import annotations

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.calibration_memory import calibration_terms
from edge_moe.plan import MemoryTerm, formula_terms

FEWER_TOKENS = "lower --sample-tokens, or use a machine with more memory"


def transform_terms(
    checkpoint: Checkpoint,
    sample_tokens: int,
    window_tokens: int,
    new_weights: int,
    scratch_bytes: int,
) -> list[MemoryTerm]:
    """Upper bounds of what the pass over the layers adds to a process that has imported torch.

    layer        the layer in float32, as for calibration
    new layer    4 bytes x the layer's new expert weights, at most doubled by an indexed copy
    samples      T x (8H inputs, twice while joined, + 8E logits + 36k routing)
    method       what the method itself needs, scores of all layers' hidden units included
    window, scratch, allowance: as for calibration
    """
    spec = checkpoint.spec
    calibration = {
        term.name: term.num_bytes
        for term in calibration_terms(checkpoint, sample_tokens, window_tokens)
    }
    per_token = 8 * spec.hidden_size + 8 * spec.num_experts + 36 * spec.top_k
    terms = {
        "layer": calibration["layer"],
        "new layer": 8 * new_weights,
        "samples": sample_tokens * per_token,
        "method": scratch_bytes,
        "window": calibration["window"],
        "scratch": calibration["scratch"],
        "allowance": calibration["allowance"],
    }
    return formula_terms(terms)
