"""`SlotFiller`: brings a packed expert into a slot, from the disk or from RAM beside it."""

from __future__ import annotations

from functools import partial

from edge_moe.runtime.expert_store import ExpertStore
from edge_moe.runtime.host_tier import HostTier
from edge_moe.runtime.policy import Key
from edge_moe.runtime.slots import SlotBuffers
from edge_moe.runtime.streams import Mark
from edge_moe.runtime.transfer import Transfer


class SlotFiller:
    """Thread-safe, for different slots."""

    def __init__(
        self, store: ExpertStore, buffers: SlotBuffers, host: HostTier | None, transfer: Transfer
    ) -> None:
        self._store = store
        self._buffers = buffers
        self._host = host
        self._transfer = transfer
        self._used_until: dict[tuple[int, int], Mark] = {}
        """By size and slot: the last use of what it held before."""

    def note_use(self, record_bytes: int, slot: int, last_use: Mark | None) -> None:
        """What left the slot was used until then; None: what is known of the slot stays true."""
        if last_use is not None:
            self._used_until[record_bytes, slot] = last_use

    def is_in_ram(self, key: Key) -> bool:
        """Whether the host tier has it."""
        return self._host is not None and self._host.has(key)

    def fill(self, key: Key, slot: int, *, uses_ram: bool) -> tuple[Mark | None, bool]:
        """(when the expert is in the slot, unless that is now; whether it was in RAM).

        With `uses_ram` it is kept in the host tier, if there is one. Raises what reading raises.
        """
        size = self._store.record(key).num_bytes
        target, after = self._buffers.view(size, slot), self._used_until.get((size, slot))
        read = partial(self._store.read_into, key)
        if self._host is None or not uses_ram:
            return self._transfer.from_storage(read, target, after), False
        kept = self._host.hold(key)
        was_in_ram = kept is not None
        if kept is None:
            kept = self._host.read(key, size, read)
        if kept is None:
            return self._transfer.from_storage(read, target, after), False
        arrival = None
        try:
            arrival = self._transfer.from_host(kept, target, after)
        finally:
            self._host.let_go(key, arrival)
        return arrival, was_in_ram

    def fill_host(self, key: Key) -> None:
        """Read an expert into the host tier, where it has room."""
        size = self._store.record(key).num_bytes
        if self._host is None or not self._host.has_room(size):
            return
        if self._host.read(key, size, partial(self._store.read_into, key)) is not None:
            self._host.let_go(key, None)
