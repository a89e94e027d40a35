"""What a plan says beside its numbers: limits of the target, and warnings."""

from __future__ import annotations

import numpy as np

from edge_moe.candidates import TARGET_RULES
from edge_moe.plan import SearchRecord, Target
from edge_moe.problem import BoolArray, Solution
from edge_moe.spec import ModelSpec
from edge_moe.stats import ExpertStats
from edge_moe.super_experts import MINIMUM_BITS

EVIDENCE_TOKENS = 32
"""An expert that fewer calibration tokens chose has a loss that is hardly more than a guess."""
UNSEARCHED = "planned by predicted loss alone: it was not measured on held-out text."
THIN_EVIDENCE_SHARE = 0.1
"""Share of experts below `EVIDENCE_TOKENS` from which a plan warns."""


def super_expert_limits(spec: ModelSpec, supers: BoolArray, target: Target) -> list[str]:
    """Where a shared form makes the neighbours of a super expert pay."""
    scope = TARGET_RULES[target].scope
    layers = [spec.moe_layer_ids[layer] for layer in np.flatnonzero(supers.any(axis=1))]
    if scope == "expert" or target == "hf" or not layers:
        return []
    where = "the whole model" if scope == "model" else f"layers {', '.join(map(str, layers))}"
    return [f"Super experts share their form: {where} cannot go below {MINIMUM_BITS} bits."]


def search_warnings(record: SearchRecord | None, *, is_expected: bool) -> list[str]:
    """Short of the reason, which may name folders: `record` has it, model cards repeat these."""
    if record is None or not record.trials:
        return [UNSEARCHED] if is_expected else []
    if not record.failure:
        return []
    count = len(record.trials)
    return [
        f"the search ended early: after {count} plan{'s' * (count != 1)} no more could be measured."
    ]


def solver_warnings(solution: Solution) -> list[str]:
    """What a better solver could still win."""
    if solution.gap == 0.0:
        return []
    return [
        "the optimiser stopped at its time limit: "
        f"up to {solution.gap:.2%} of the predicted loss could still be won."
    ]


def context_warnings(asked_tokens: int | None, context_tokens: int) -> list[str]:
    """Where the model's own context is shorter than what was asked for."""
    if asked_tokens in (None, context_tokens):
        return []
    return [f"context lowered from {asked_tokens} to {context_tokens} tokens, the model's maximum."]


def evidence_warnings(stats: ExpertStats) -> list[str]:
    """Where too many experts were seen too rarely."""
    thin = int((stats.routed_tokens < EVIDENCE_TOKENS).sum())
    if thin <= THIN_EVIDENCE_SHARE * stats.routed_tokens.size:
        return []
    return [
        f"not enough evidence: {thin} of {stats.routed_tokens.size} experts were chosen by fewer "
        f"than {EVIDENCE_TOKENS} of {stats.info.num_tokens} calibration tokens; "
        "calibrate on more text."
    ]
