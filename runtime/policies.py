"""Every order of eviction by name, and the one that the engines use."""

from __future__ import annotations

from edge_moe.errors import InputError
from edge_moe.runtime.next_use import SoonestNextUse
from edge_moe.runtime.pinned import FrequencyPinned
from edge_moe.runtime.policy import EvictionPolicy, LeastFrequentlyUsed, LeastRecentlyUsed

DEFAULT_POLICY: type[EvictionPolicy] = SoonestNextUse
POLICIES: dict[str, type[EvictionPolicy]] = {
    policy.name: policy
    for policy in (SoonestNextUse, LeastRecentlyUsed, LeastFrequentlyUsed, FrequencyPinned)
}


def policy_named(name: str) -> type[EvictionPolicy]:
    """The policy called `name`.

    Raises:
        InputError: unknown name, with the known ones.
    """
    if name not in POLICIES:
        raise InputError(f"policy {name!r} is unknown; known: {', '.join(POLICIES)}")
    return POLICIES[name]
