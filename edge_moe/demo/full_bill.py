"""The memory bill of a whole model, and the budget that leaves a share of its experts' bytes."""

from __future__ import annotations

from edge_moe.budget import Setting, non_expert_bytes
from edge_moe.candidates import candidate_forms, least_expert_bytes
from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import BudgetError, InputError
from edge_moe.overhead import runtime_overhead, tokenizer_bytes
from edge_moe.plan import MemoryTerm
from edge_moe.spec import ModelSpec
from edge_moe.units import format_bytes

CONTEXT_TOKENS = 1024
"""The demo model was made for no more."""


def sixteen_bit_form(spec: ModelSpec) -> str:
    """The form that stores an expert as the checkpoint does."""
    return candidate_forms(spec, "native")[-1]


def full_terms(checkpoint: Checkpoint, context_tokens: int = CONTEXT_TOKENS) -> list[MemoryTerm]:
    """The memory bill of the whole model on CPU: every expert at 16 bits."""
    spec = checkpoint.spec
    runtime_bytes, source = runtime_overhead(spec.model_type, "cpu")
    process = runtime_bytes + tokenizer_bytes(checkpoint.folder), source
    context = min(context_tokens, spec.max_position_embeddings)
    return Setting(checkpoint, "native", "cpu", context, process).bill(full_forms(spec))


def budget_for_share(
    checkpoint: Checkpoint, share: float, context_tokens: int = CONTEXT_TOKENS
) -> int:
    """The budget that leaves `share` of the experts' 16-bit bytes to the experts.

    Raises:
        InputError: `share` is not between 0 and 1.
    """
    if not 0 < share <= 1:
        raise InputError(f"share {share} is not between 0 and 1: use for example 0.5")
    terms = full_terms(checkpoint, context_tokens)
    return sum(
        int(share * term.num_bytes) if term.name == "experts" else term.num_bytes for term in terms
    )


def require_possible(checkpoint: Checkpoint, budget_bytes: int) -> None:
    """Refuse at once what no plan could fit: top_k experts per layer in the smallest form.

    Raises:
        BudgetError: `budget_bytes` is below that.
    """
    spec = checkpoint.spec
    minimum = non_expert_bytes(full_terms(checkpoint)) + least_expert_bytes(spec, "native")
    if budget_bytes < minimum:
        raise BudgetError(
            f"budget {format_bytes(budget_bytes)} is too small for the demo: it needs at least "
            f"{minimum}B ({format_bytes(minimum)}); raise --budget or leave it out",
            minimum,
        )


def full_forms(spec: ModelSpec) -> list[list[str]]:
    """[L][E] every expert at 16 bits."""
    return [[sixteen_bit_form(spec)] * spec.num_experts] * spec.num_moe_layers
