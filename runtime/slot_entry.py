"""What is known of an expert that has a slot."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import Enum

from edge_moe.runtime.streams import Mark


class State(Enum):
    """Life of a slot's contents."""

    LOADING = "loading"
    RESIDENT = "resident"  # or on its way: see `Entry.arrival`
    FAILED = "failed"


@dataclass(eq=False)
class Entry:
    """One expert that has a slot."""

    record_bytes: int
    slot: int
    state: State
    is_prefetched: bool
    is_begun: bool = False
    """By a reader, which goes through with it."""
    pins: int = 0
    arrival: Mark | None = None
    """When the bytes are there, while that is not sure."""
    last_use: Mark | None = None
    """When the kernels that were launched for it are done."""
    error: BaseException | None = None
    ready: threading.Event = field(default_factory=threading.Event)
