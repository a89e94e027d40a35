"""What recovery needs in memory and on disk, before it starts. No torch.

Recovery goes through three phases, one after the other; its need is that of the largest. T tokens
in all windows, W in the longest, H hidden_size, I expert_width, R experts of a layer, r rank, V
vocabulary, k top_k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from edge_moe.available_memory import available_memory_bytes
from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import BudgetError
from edge_moe.package import Package
from edge_moe.plan import MemoryTerm, formula_terms
from edge_moe.runtime.allotment import dense_tensors
from edge_moe.units import format_bytes

BRANCHED_LAYER = "self_attn.o_proj"
_BRANCH_COPIES = 8  # value, gradient, two moments, best value, what the optimiser and saving make
_ALLOWANCE_BYTES = 160_000_000  # libraries paged in by the first backward pass, allocator slack


def original_terms(original: Checkpoint) -> list[MemoryTerm]:
    """While the original predicts: its dense part in float32, its experts as they are stored."""
    dense = sum(4 * math.prod(info.shape) for info in original.dense_tensors)
    experts = sum(original.tensors[name].num_bytes for name in original.expert_tensors)
    return _terms({"original, dense": dense, "original, experts": experts})


def router_terms(original: Checkpoint, package: Package, num_tokens: int) -> list[MemoryTerm]:
    """While routers are fitted.

    layers   4 bytes x (E + R) x 3HI, and twice the largest layer's dense weights
    hidden   T x 4 (6H: hidden states and router inputs of both models, and what replaces them)
    fit      T x 4 (8R + H), and 20 copies of the rows
    """
    spec = original.spec
    rows = max(len(layer.experts) for layer in package.manifest.layers)
    dense = max(_layer_weights(original, layer) for layer in range(spec.num_layers))
    experts = (spec.num_experts + rows) * spec.expert_weights
    return _terms(
        {
            "layers": 4 * (experts + 2 * dense),
            "hidden states": 24 * num_tokens * spec.hidden_size,
            "fit": num_tokens * 4 * (8 * rows + spec.hidden_size) + 80 * rows * spec.hidden_size,
        }
    )


def num_branch_weights(package: Package, rank: int) -> int:
    """r x (in + out) of every attention output."""
    outputs = [
        info.shape
        for info in dense_tensors(package)
        if info.name.endswith(f"{BRANCHED_LAYER}.weight")
    ]
    return rank * sum(map(sum, outputs))


def branch_terms(package: Package, rank: int, window_tokens: int) -> list[MemoryTerm]:
    """While branches are trained; one window at a time.

    student      4 bytes x every weight that the package keeps
    branches     32 bytes x r x (in + out) of every attention output
    activations  W x 4 (layers x (16H + 10 x widest attention row + k (6H + 10I)) + 8V)
                 + 12 x layers x heads x W**2 attention scores
    """
    spec = package.spec
    dense = dense_tensors(package)
    attention = [info.shape for info in dense if ".self_attn." in info.name]
    widest = max((max(shape) for shape in attention), default=spec.hidden_size)
    kept = sum(len(layer.experts) for layer in package.manifest.layers)
    hidden, width = spec.hidden_size, spec.expert_width
    row = 16 * hidden + 10 * widest + spec.top_k * (6 * hidden + 10 * width)
    scores = 12 * spec.num_layers * spec.num_attention_heads * window_tokens**2
    return _terms(
        {
            "student": 4 * (kept * spec.expert_weights + sum(math.prod(i.shape) for i in dense)),
            "branches": 4 * _BRANCH_COPIES * num_branch_weights(package, rank),
            "activations": 4 * window_tokens * (spec.num_layers * row + 8 * spec.vocab_size)
            + scores,
        }
    )


def total_bytes(terms: Sequence[MemoryTerm]) -> int:
    return sum(term.num_bytes for term in terms)


def require_memory(
    phases: dict[str, list[MemoryTerm]], limit_bytes: int | None
) -> tuple[str, list[MemoryTerm]]:
    """(name, terms) of the phase that needs most; `limit_bytes` None means what is available.

    Raises:
        BudgetError: it needs more than the limit.
    """
    name, terms = max(phases.items(), key=lambda phase: total_bytes(phase[1]))
    needed_bytes = total_bytes(terms)
    is_asked = limit_bytes is not None
    limit_bytes = limit_bytes if is_asked else available_memory_bytes()
    if limit_bytes is not None and needed_bytes > limit_bytes:
        parts = ", ".join(f"{term.name} {format_bytes(term.num_bytes)}" for term in terms)
        remedies = {
            "branches": "train no branches (--no-branches), use smaller windows "
            "(--window-tokens), or a machine with more memory",
            "routers": "use fewer windows (--max-windows), or a machine with more memory",
            "original": "use a machine with more memory",
        }
        raise BudgetError(
            f"recovery ({name}) needs {format_bytes(needed_bytes)} of memory ({parts}), but "
            f"{'--max-memory allows' if is_asked else 'available is'} "
            f"{format_bytes(limit_bytes)}: {remedies[name]}",
            minimum_bytes=needed_bytes,
        )
    return name, terms


def _terms(terms: dict[str, int]) -> list[MemoryTerm]:
    return formula_terms(terms | {"allowance": _ALLOWANCE_BYTES})


def _layer_weights(checkpoint: Checkpoint, layer_id: int) -> int:
    prefix, tensors = checkpoint.spec.layer_prefix(layer_id), checkpoint.dense_tensors
    return sum(math.prod(info.shape) for info in tensors if info.name.startswith(prefix))
