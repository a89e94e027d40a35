"""How a packed expert gets into its slot, whatever the slot's device is.

On a CPU it is read into the slot. A GPU copies it from pinned RAM on a stream of its own: nobody
waits but the kernels that need it, and a slot is not overwritten while kernels still read it.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from edge_moe.budget import STAGING_BUFFERS
from edge_moe.runtime.streams import Mark, Streams

Fill = Callable[[memoryview], None]
"""Reads a record into memory of its size."""


class Transfer(ABC):
    """Fills slots. `after` is the last use of what the slot held; an arrival may be None: there."""

    @abstractmethod
    def from_storage(self, fill: Fill, slot: Tensor, after: Mark | None) -> Mark | None:
        """Fill `slot` (uint8 [record_bytes]) with what `fill` reads; its arrival.

        Raises what `fill` raises; the slot may hold anything then.
        """

    @abstractmethod
    def from_host(self, record: Tensor, slot: Tensor, after: Mark | None) -> Mark | None:
        """As `from_storage`, from memory of the host tier, which must not change before arrival."""

    @abstractmethod
    def require(self, arrival: Mark) -> None:
        """Kernels launched from now on need what arrives then; for the model's thread."""

    @abstractmethod
    def has_arrived(self, arrival: Mark) -> bool:
        """Whether it is there; asks without waiting."""

    @abstractmethod
    def wait(self, mark: Mark) -> None:
        """Hold the calling thread until then."""

    @abstractmethod
    def mark_use(self) -> Mark | None:
        """The end of all kernels that were launched; for the model's thread."""

    def stalled_seconds(self) -> float:
        """Time that kernels waited for arrivals, as far as it was not told before."""
        return 0.0

    @abstractmethod
    def close(self) -> None:
        """Finish what is under way and free the host's memory."""


class DirectTransfer(Transfer):
    """Slots in the host's own memory."""

    def from_storage(self, fill: Fill, slot: Tensor, after: Mark | None) -> None:
        fill(memoryview(slot.numpy().data))

    def from_host(self, record: Tensor, slot: Tensor, after: Mark | None) -> None:
        slot.copy_(record)

    def require(self, arrival: Mark) -> None:
        pass

    def has_arrived(self, arrival: Mark) -> bool:
        return True

    def wait(self, mark: Mark) -> None:
        pass

    def mark_use(self) -> None:
        return None

    def close(self) -> None:
        pass


@dataclass(eq=False)
class _Staging:
    memory: Tensor
    copied: Mark | None = None
    """End of the last copy from it."""


class StagedTransfer(Transfer):
    """Slots on a device; what comes from storage goes through a fixed pool of staging buffers."""

    def __init__(self, streams: Streams, largest_record_bytes: int) -> None:
        """Raises InputError where the staging buffers cannot be allocated."""
        self._streams = streams
        size, count = largest_record_bytes, STAGING_BUFFERS
        self._memory = streams.host_memory(size * count)
        self._free = deque(
            _Staging(self._memory[place * size : (place + 1) * size]) for place in range(count)
        )
        self._changed = threading.Condition()

    def from_storage(self, fill: Fill, slot: Tensor, after: Mark | None) -> Mark:
        staging = self._take()
        try:
            if staging.copied is not None:
                self._streams.wait(staging.copied)
            record = staging.memory[: slot.numel()]
            fill(memoryview(record.numpy().data))
            staging.copied = self._streams.copy(record, slot, after)
            return staging.copied
        finally:
            self._give_back(staging)

    def from_host(self, record: Tensor, slot: Tensor, after: Mark | None) -> Mark:
        return self._streams.copy(record, slot, after)

    def require(self, arrival: Mark) -> None:
        self._streams.compute_waits_for(arrival)

    def has_arrived(self, arrival: Mark) -> bool:
        return self._streams.is_reached(arrival)

    def wait(self, mark: Mark) -> None:
        self._streams.wait(mark)

    def mark_use(self) -> Mark:
        return self._streams.mark_compute()

    def stalled_seconds(self) -> float:
        return self._streams.stalled_seconds()

    def close(self) -> None:
        self._streams.close()

    def _take(self) -> _Staging:
        """The buffer that was copied from longest ago."""
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            return self._free.popleft()

    def _give_back(self, staging: _Staging) -> None:
        with self._changed:
            self._free.append(staging)
            self._changed.notify()
