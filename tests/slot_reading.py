"""One expert at a time out of an `ExpertCache`."""

from __future__ import annotations

import torch

from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.policy import Key


def acquire(cache: ExpertCache, key: Key) -> torch.Tensor:
    """uint8 [record_bytes], pinned until it is released; nothing is, where it cannot be read."""
    slot = cache.begin_beside(key, ())
    assert slot is not None
    try:
        cache.wait_for([key])
    except BaseException:
        cache.release(key)
        raise
    return cache.slot(key, slot)
