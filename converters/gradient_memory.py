"""What measuring loss gradients needs in memory, before it starts. No torch.

One decoder layer, or the output matrix, is held at a time, never the model. Letters as in
`edge_moe.converters.calibration_memory`, V vocabulary.
"""

from __future__ import annotations

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.calibration_memory import READ_BYTES_PER_WEIGHT, calibration_terms
from edge_moe.plan import MemoryTerm, formula_terms
from edge_moe.spec import ModelSpec

CHUNK_LOGITS = 2**22
"""Logits that are in memory at a time, four times over."""
_LAYER_FORMS = 16  # forms or fewer, of which three costs each are summed
_STATISTICS_COPIES = 4  # as stored, as sums, and what adding one to the other takes


def logit_rows(vocab_size: int) -> int:
    """Rows of logits that are made at a time."""
    return max(1, CHUNK_LOGITS // vocab_size)


def statistics_bytes(spec: ModelSpec) -> int:
    """Memory of the statistics of all layers while they are read or put together."""
    return _STATISTICS_COPIES * spec.num_moe_layers * _layer_sums_bytes(spec)


def _layer_sums_bytes(spec: ModelSpec) -> int:
    return 16 * spec.num_experts * (2 * spec.expert_width + 3 * _LAYER_FORMS)


def gradient_terms(
    checkpoint: Checkpoint, num_tokens: int, window_tokens: int, quantiser: str = "nearest"
) -> list[MemoryTerm]:
    """Upper bounds of what a gradient run adds to a process that has imported torch, by term.

    weights      the largest of one layer (4 bytes per weight), the output matrix (11 bytes per
                 weight while it is read, then 4 and 16 per logit of a chunk) and, when no layer is
                 held any more, four times the sums of all layers
    activations  T x (4H inputs + 4H gradients + 4H outputs of an expert that gets every token
                 + 16 (k + 1) routing + 4E router scores)
    window       W x (4 (8 (k + 1) (H + 2I) + 24 H + 12 x widest dense row) + 64 k (k + 1))
                 + 24 x heads x W**2 attention scores: what autograd keeps for the way back
    sums         16 bytes x E x (2I neurons + 3 costs x 16 forms or fewer) and a copy
    scratch, allowance, hessians  as in calibration
    """
    spec = checkpoint.spec
    hidden, width, slots = spec.hidden_size, spec.expert_width, spec.top_k + 1
    terms = {
        term.name: term.num_bytes
        for term in calibration_terms(checkpoint, num_tokens, window_tokens, quantiser)
    }
    logits = 16 * min(window_tokens, logit_rows(spec.vocab_size)) * spec.vocab_size
    head = spec.vocab_size * hidden
    widest = max(max(info.shape[1:], default=1) for info in checkpoint.dense_tensors)
    row_bytes = 4 * (8 * slots * (hidden + 2 * width) + 24 * hidden + 12 * widest)
    row_bytes += 64 * slots * spec.top_k
    found = {
        "weights": max(
            terms["layer"],
            READ_BYTES_PER_WEIGHT * head,
            4 * head + logits,
            statistics_bytes(spec),
        ),
        "activations": num_tokens * (12 * hidden + 16 * slots + 4 * spec.num_experts),
        "window": window_tokens * row_bytes + 24 * spec.num_attention_heads * window_tokens**2,
        "sums": 2 * _layer_sums_bytes(spec),
        "scratch": terms["scratch"],
        "allowance": terms["allowance"],
        "hessians": terms.get("hessians", 0),
    }
    return formula_terms(found)
