"""Does reading ahead pay on this machine?"""

from __future__ import annotations

from edge_moe.runtime.interleaved_trial import InterleavedTrial


class PrefetchTrial(InterleavedTrial):
    """Whether to read experts ahead. Results do not depend on it."""
