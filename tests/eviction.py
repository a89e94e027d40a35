"""What the tests of eviction share."""

from __future__ import annotations

from collections.abc import Iterable

from edge_moe.runtime.policy import EvictionPolicy, Key


def anything(key: Key) -> bool:
    return True


def filled(policy: EvictionPolicy, keys: Iterable[Key]) -> EvictionPolicy:
    for key in keys:
        policy.admit(key)
    return policy
