"""Counts of routed and skipped experts as cost per token; the same for `eval` and `simulate`."""

from __future__ import annotations

from edge_moe.measurement import SkippingCost
from edge_moe.runtime.policy import RoutedCounts


def skipping_cost(
    rule: str,
    counts: RoutedCounts,
    num_tokens: int,
    *,
    dense_parameters: int,
    expert_parameters: int,
) -> SkippingCost:
    """What `num_tokens` tokens cost per token under `rule`; zero work where there is no token.

    `dense_parameters` are all weights outside routed experts, `expert_parameters` those of one
    routed expert: experts have one shape, whatever form they are packed in.
    """
    tokens = max(num_tokens, 1)
    active = (counts.routed_experts - counts.skipped_experts) / tokens
    return SkippingCost(
        rule=rule,
        routed_per_token=counts.routed_experts / tokens,
        active_per_token=active,
        active_parameters=dense_parameters + active * expert_parameters,
        routed_bytes_per_token=counts.routed_bytes / tokens,
        saved_bytes_per_token=counts.skipped_bytes / tokens,
    )
