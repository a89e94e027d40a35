"""What splitting needs in memory, before it starts.

T tokens, H hidden_size, F neurons, E experts, I their width, V vocabulary, L layers, N heads,
W tokens of a window.
"""

from __future__ import annotations

import math

from edge_moe.converters.upcycle.dense_model import DenseModel
from edge_moe.converters.upcycle.split_student import DistilSettings, trained_weights
from edge_moe.converters.upcycle.target import MoeShape
from edge_moe.plan import MemoryTerm, formula_terms

_ALLOWANCE_BYTES = 100_000_000
SPLIT_REMEDY = (
    "use fewer windows (--max-windows), shorter ones (--seq), or a machine with more memory"
)
DISTIL_REMEDY = "use a smaller --seq, --train routers, --steps 0, or a machine with more memory"


def split_terms(dense: DenseModel, shape: MoeShape, num_tokens: int) -> list[MemoryTerm]:
    """What splitting takes at most.

    embedding   4 V H, while the text is embedded
    one layer   16 x F H
    states      4 T x 3 H: hidden states, and what the FFN is given, while windows are joined
    neurons     4 T x 4 F: activations, strengths, and those in the order of experts, squared
    clusters    12 (E I)**2 for the assignment, and 4 x 4 x T / 3 x F for what fires
    """
    config = dense.config
    hidden, width = config.hidden_size, config.ffn_width
    clustered = shape.num_experts * shape.expert_width
    terms = {
        "embedding": 4 * config.vocab_size * hidden,
        "one layer": 16 * width * hidden,
        "states": 12 * num_tokens * hidden,
        "neurons": 16 * num_tokens * width,
        "clusters": 12 * clustered**2 + 6 * num_tokens * width,
        "allowance": _ALLOWANCE_BYTES,
    }
    return formula_terms(terms)


def distil_terms(
    dense: DenseModel, shape: MoeShape, settings: DistilSettings, window_tokens: int
) -> list[MemoryTerm]:
    """What distillation takes at most.

    weights      4 bytes x every weight, an output matrix of its own included
    trained      4 bytes x 5 x every weight that learns: value, gradient, two moments, the best
    activations  4 W x (L (14 H + 4 Q + 8 F) + 8 V), Q the width of queries, and the attention's
                 scores, 12 L N W**2
    """
    config = dense.config
    weights = sum(math.prod(tensor.shape) for tensor in dense.tensors.values())
    weights += config.num_layers * (shape.num_experts + 1) * config.hidden_size
    weights += config.vocab_size * config.hidden_size if config.is_tied else 0
    queries = config.num_heads * config.head_width
    row = config.num_layers * (14 * config.hidden_size + 4 * queries + 8 * config.ffn_width)
    activations = 4 * window_tokens * (row + 8 * config.vocab_size)
    terms = {
        "weights": 4 * weights,
        "trained": 20 * trained_weights(dense, shape, settings.trains),
        "activations": activations + 12 * config.num_layers * config.num_heads * window_tokens**2,
        "allowance": _ALLOWANCE_BYTES,
    }
    return formula_terms(terms)
