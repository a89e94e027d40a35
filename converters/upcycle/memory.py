"""What upcycling needs in memory, before it starts.

W tokens of a window, H hidden_size, I ffn_width, E experts, K top_k, V vocabulary, N heads.
"""

from __future__ import annotations

import math

from edge_moe.converters.upcycle.dense_model import DenseModel, ffn_names
from edge_moe.converters.upcycle.student import UpcycleSettings
from edge_moe.converters.upcycle.target import MoeShape
from edge_moe.plan import MemoryTerm, formula_terms

_TRAINED_COPIES = 6  # value, what is used, one gradient, two moments, the best value
_FRAGMENTS = 12  # the allocator leaves holes of one part in so many
_ALLOWANCE_BYTES = 160_000_000  # libraries paged in by the first backward pass, allocator slack
_SHARED_COPIES = 4  # beside the value: gradient, two moments, the best


def student_terms(
    dense: DenseModel, shape: MoeShape, settings: UpcycleSettings, window_tokens: int
) -> list[MemoryTerm]:
    """While routed experts are trained; one window at a time.

    dense part   4 bytes x every weight of the dense model
    trained      4 bytes x 6 x every routed weight, scale and router row; 16 bytes x shared weights
                 where those are trained; and a twelfth of it for holes
    one matrix   4 bytes x 4 x the largest routed matrix, while used weights are made
    activations  W x 4 (layers x (14H + 4NH/N + (1 + K)(2H + 8I)) + 8V) + 12 x layers x N x W**2
                 scores; with checkpointing of one layer, and layers x H
    """
    config = dense.config
    hidden, width, layers = config.hidden_size, config.ffn_width, config.num_layers
    tensors = dense.tensors.values()
    ffn = sum(
        math.prod(dense.tensors[name].shape) for layer in range(layers) for name in ffn_names(layer)
    )
    scales = sum(columns // settings.group_of(columns) for columns in (hidden, hidden)) * width
    scales += width // settings.group_of(width) * hidden
    trained = shape.num_experts * (ffn + layers * (scales + hidden))
    copies = _TRAINED_COPIES * trained
    copies += _SHARED_COPIES * ffn if settings.trains_shared else 0
    queries = config.num_heads * config.head_width
    row = 14 * hidden + 4 * queries + (1 + shape.top_k) * (2 * hidden + 8 * width)
    kept = 1 if settings.is_checkpointing else layers
    activations = window_tokens * (kept * row + layers * hidden + 8 * config.vocab_size)
    scores = 3 * kept * config.num_heads * window_tokens**2
    terms = {
        "dense part": 4 * sum(math.prod(tensor.shape) for tensor in tensors),
        "trained": 4 * copies + 4 * copies // _FRAGMENTS,
        "one matrix": 16 * hidden * width,
        "activations": 4 * (activations + scores),
        "allowance": _ALLOWANCE_BYTES,
    }
    return formula_terms(terms)


def untrained_terms(dense: DenseModel) -> list[MemoryTerm]:
    """While nothing is trained: 20 bytes x the largest tensor, read, rounded and packed."""
    largest = max(math.prod(tensor.shape) for tensor in dense.tensors.values())
    return formula_terms({"one matrix": 20 * largest, "allowance": _ALLOWANCE_BYTES})
