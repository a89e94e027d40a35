"""Which packed expert is in which slot: page in, pin, evict. Exact whatever the cache holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

from edge_moe.runtime.expert_store import ExpertStore
from edge_moe.runtime.host_tier import HostTier
from edge_moe.runtime.policy import EvictionPolicy, Key, PagingStatistics
from edge_moe.runtime.slot_entry import Entry, State
from edge_moe.runtime.slot_filler import SlotFiller
from edge_moe.runtime.slots import SlotBuffers
from edge_moe.runtime.streams import Mark
from edge_moe.runtime.transfer import DirectTransfer, Transfer


class ExpertCache:
    """Slots filled from an `ExpertStore`.

    Contract: `begin_beside` pins an expert until `release`, and has it read by one of the readers;
    its bytes are there after `wait_for`, where a failed read raises. A pinned or loading slot is
    never evicted; `prefetch` never evicts a key in `keep` and gives up when no slot of the size is
    free to take. All bookkeeping happens under one lock, reads outside it.

    On a GPU kernels that are launched between `wait_for` and `release` find the bytes there, though
    neither waits for the device. Both belong to the model's thread then.
    """

    def __init__(
        self,
        store: ExpertStore,
        buffers: SlotBuffers,
        policy: type[EvictionPolicy],
        *,
        host: HostTier | None = None,
        transfer: Transfer | None = None,
        num_readers: int = 0,
    ) -> None:
        """`transfer` fills the slots; without one they are in the host's own memory.

        Without readers, who asks for an expert reads it.
        """
        self._store = store
        self._buffers = buffers
        self._policies = {size: policy() for size in buffers.counts}
        self._transfer = transfer or DirectTransfer()
        self._filler = SlotFiller(store, buffers, host, self._transfer)
        self._readers: ThreadPoolExecutor | None = None
        if num_readers:
            self._readers = ThreadPoolExecutor(num_readers, thread_name_prefix="edge-moe-page-in")
        self._read_until = 0.0
        """Of all reads that are over."""
        self._lock = threading.RLock()  # left in C: Ctrl-C cannot come before it is let go of
        self._changed = threading.Condition(self._lock)
        self._entries: dict[Key, Entry] = {}
        self._free = {size: list(range(count)) for size, count in buffers.counts.items()}
        self.statistics = PagingStatistics()
        self.expected: frozenset[Key] = frozenset()
        """What is known to be asked for soon: others leave for a demand, while there are any."""

    @property
    def slot_bytes(self) -> int:
        """Bytes that the slots take on the device."""
        return self._buffers.num_bytes

    def begin_beside(self, key: Key, held: Collection[Key]) -> int | None:
        """The expert's slot among those of its size, pinned; it may still be read: see `wait_for`.

        None where the policy would evict one of `held` for it, which the caller has pinned: let go
        of them first. With nothing held there is always a slot.
        """
        entry: Entry | None = None
        is_mine = False
        try:
            with self._lock:
                if held and self._would_evict(key, held):
                    return None
                self._wait_for_slot(key)
                entry, is_mine = self._pin(key)
            if is_mine:
                self._begin_load(key, entry)
            return entry.slot
        except BaseException as error:  # Ctrl-C may come at any line: leave no pin behind
            if entry is None:
                raise
            if is_mine:
                self._fail(entry, error)
            self.release(key)
            raise

    def here(self, keys: Iterable[Key]) -> list[Key]:
        """Those of `keys`, which are pinned, that `wait_for` would not wait for."""
        return [key for key in keys if self._entries[key].ready.is_set()]

    def wait_for(self, keys: Iterable[Key]) -> None:
        """Until all of `keys`, which are pinned, are there.

        Raises:
            PackageError, OSError: one could not be read. All stay pinned.
        """
        entries = [self._entries[key] for key in keys]
        for entry in entries:
            self._wait(entry)
            if entry.error is not None:
                raise entry.error
        self._require(entries)

    def acquire_residents(self, keys: Sequence[Key]) -> list[int] | None:
        """Slots of all of `keys`, pinned; None, and nothing done, if one is absent.

        The same as to begin with them one by one, in less time.
        """
        entries = []
        with self._lock:
            for key in keys:
                entry = self._entries.get(key)
                if entry is None or entry.state is not State.RESIDENT:
                    return None
                entries.append(entry)
            for key, entry in zip(keys, entries, strict=True):
                entry.pins += 1
                self._count_use(key, entry, False)
        self._require(entries)
        return [entry.slot for entry in entries]

    def release_residents(self, keys: Collection[Key]) -> None:
        """Undo one `acquire_residents`, or `begin_beside` of each, when kernels are launched."""
        used = self._transfer.mark_use()
        with self._lock:
            for key in keys:
                entry = self._entries[key]
                entry.pins -= 1
                entry.last_use = used
                if entry.state is State.FAILED and entry.pins == 0:
                    self._remove(key, entry)
            self.statistics.stall_seconds += self._transfer.stalled_seconds()
            self._changed.notify_all()

    def arrived(self, keys: Sequence[Key]) -> list[Key]:
        """Those of `keys` that nobody would have to wait for. None is pinned, or counts as used."""
        with self._lock:
            found = [(key, self._entries[key]) for key in keys if key in self._entries]
            return [key for key, entry in found if self._is_here(entry)]

    def claim(self, key: Key) -> Entry | None:
        """A slot for `key`, which was asked for and computed otherwise.

        None where nothing may leave for it, or where it would be the first to leave itself: such a
        body would hardly be used. It counts as used just now, anyway. Whoever claims it must call
        `fill_claimed`, which another thread may do.
        """
        entry = None
        try:
            with self._lock:
                if key in self._entries:
                    return None
                entry = self._claim(key)
            return entry
        except BaseException as error:  # Ctrl-C may come at any line: nobody would fill it
            if entry is not None:
                self._fail(entry, error)
                self._drop_failed(key, entry)
            raise

    def fill_claimed(self, key: Key, entry: Entry) -> BaseException | None:
        """Read a claimed expert into its slot; what went wrong, if something did.

        The calling thread waits until it is there, and nobody else.
        """
        arrival = self._load(key, entry, is_demand=False)
        if arrival is not None:
            self._transfer.wait(arrival)
        error = entry.error
        self._drop_failed(key, entry)
        return error

    def slot(self, key: Key, slot: int) -> torch.Tensor:
        """uint8 [record_bytes] at a place that was found for it."""
        return self._buffers.view(self._store.record(key).num_bytes, slot)

    def release(self, key: Key) -> None:
        """Undo one `begin_beside`, when the kernels that need it are launched."""
        self.release_residents((key,))

    def is_resident(self, key: Key) -> bool:
        """Whether `key` has a slot, loaded or loading."""
        with self._lock:
            return key in self._entries

    def count_elsewhere(self, keys: Collection[Key]) -> None:
        """Misses that are computed without a slot."""
        with self._lock:
            self.statistics.misses += len(keys)
            self.statistics.cpu_experts += len(keys)
            self.statistics.cpu_bytes += sum(self._store.record(key).num_bytes for key in keys)

    def prefetch(self, key: Key, keep: frozenset[Key]) -> bool:
        """Read `key` into a slot ahead of use; False when it has one or none can be freed.

        The calling thread waits until it is there, and nobody else.
        """
        with self._lock:
            if key in self._entries:
                return False
            entry = self._reserve(key, is_prefetched=True, keep=keep)
            if entry is None:
                return False
            self.statistics.prefetch_issued_bytes += entry.record_bytes
        arrival = self._load(key, entry, is_demand=False)
        if arrival is not None:
            self._transfer.wait(arrival)
        self._drop_failed(key, entry)
        return True

    def _fail(self, entry: Entry, error: BaseException) -> None:
        """Whoever waits for what was not read is told; what was read before `error` stays."""
        with self._lock:
            if entry.is_begun:  # a reader still writes to the slot, and says when it is done
                return
            if entry.state is State.LOADING:
                entry.error, entry.state = error, State.FAILED
        entry.ready.set()

    def _drop_failed(self, key: Key, entry: Entry) -> None:
        if entry.state is not State.FAILED:
            return
        with self._lock:
            if entry.pins == 0 and self._entries.get(key) is entry:  # else `release` did it
                self._remove(key, entry)
            self._changed.notify_all()

    def fill(self) -> None:
        """Load every expert for which there is a slot, in layer order: the state to start from.

        Those that come after them go to the host tier, as many as it holds.
        """
        entries = []
        for key in self._store.keys():
            with self._lock:
                size = self._store.record(key).num_bytes
                is_here = key in self._entries
                has_room = bool(self._free[size]) and not is_here
                entry = self._reserve(key, False, frozenset()) if has_room else None
            if entry is not None:
                self._begin_load(key, entry, is_filling=True)
                entries.append(entry)
            elif not is_here:
                self._filler.fill_host(key)
        for entry in entries:
            entry.ready.wait()
            if entry.error is not None:
                raise entry.error

    def close(self) -> None:
        """Stop the readers; what is being read is finished first."""
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)

    def check_integrity(self) -> None:
        """Raise RuntimeError if a slot is held twice, lost, or pinned below zero."""
        with self._lock:
            for size, count in self._buffers.counts.items():
                held = [item.slot for item in self._entries.values() if item.record_bytes == size]
                every = sorted(held + self._free[size])
                if every != list(range(count)):
                    raise RuntimeError(f"slots of {size} bytes are inconsistent: {every}")
            if any(entry.pins < 0 for entry in self._entries.values()):
                raise RuntimeError("an expert was released more often than acquired")

    # -- under the lock ---------------------------------------------------------------------------

    def _wait_for_slot(self, key: Key) -> None:
        """Until there is an entry, or a slot to take."""
        size = self._store.record(key).num_bytes
        while key not in self._entries:
            if self._make_room(size, self.expected) or self._make_room(size, frozenset()):
                return
            self._changed.wait()  # every slot of this size is being filled: one is ready soon

    def _pin(self, key: Key) -> tuple[Entry, bool]:
        """(entry, whether it is new and the caller must load it), for which there is a slot."""
        known = self._entries.get(key)
        pins = 0 if known is None else known.pins
        try:
            entry = self._admit(key, is_prefetched=False) if known is None else known
            self._count_use(key, entry, known is None)
            entry.pins += 1
            return entry, known is None
        except BaseException:  # Ctrl-C may come at any line: leave all as it was
            if known is None:
                self._give_up(key, self._entries.get(key))
            else:
                known.pins = pins
            raise

    def _reserve(self, key: Key, is_prefetched: bool, keep: frozenset[Key]) -> Entry | None:
        if not self._make_room(self._store.record(key).num_bytes, keep):
            return None
        return self._admit(key, is_prefetched)

    def _admit(self, key: Key, is_prefetched: bool) -> Entry:
        entry = self._take_slot(key, is_prefetched)
        self._policies[entry.record_bytes].admit(key)
        return entry

    def _take_slot(self, key: Key, is_prefetched: bool) -> Entry:
        """A new entry in a slot that is free."""
        size = self._store.record(key).num_bytes
        free = self._free[size]
        self._entries[key] = entry = Entry(size, free[-1], State.LOADING, is_prefetched)
        free.pop()  # only now: a slot that neither is free nor has an entry would be lost
        return entry

    def _claim(self, key: Key) -> Entry | None:
        try:
            return self._claim_slot(key)
        except BaseException:  # Ctrl-C may come at any line: leave nothing half claimed
            self._give_up(key, self._entries.get(key))
            raise

    def _claim_slot(self, key: Key) -> Entry | None:
        size = self._store.record(key).num_bytes
        policy = self._policies[size]
        policy.admit(key)
        policy.use(key)
        if not self._free[size]:
            victim = policy.victim(lambda other: other == key or self._may_evict(other))
            if victim is None or victim == key:
                policy.forget(key)
                return None
            self._evict(victim)
        entry = self._take_slot(key, is_prefetched=True)
        self.statistics.prefetch_issued_bytes += size
        return entry

    def _give_up(self, key: Key, entry: Entry | None) -> None:
        """Leave nothing of `key`, however much was there: nobody would fill its slot or free it."""
        size = self._store.record(key).num_bytes
        self._entries.pop(key, None)
        if entry is not None and entry.slot not in self._free[size]:
            self._free[size].append(entry.slot)
        with suppress(LookupError):  # not admitted yet, or forgotten already
            self._policies[size].forget(key)

    def _would_evict(self, key: Key, held: Collection[Key]) -> bool:
        """Whether one of `held` is what the policy would evict for `key`, were it not held."""
        size = self._store.record(key).num_bytes
        if key in self._entries or self._free[size]:
            return False
        victim = self._policies[size].victim(
            lambda other: other in held or self._entries[other].state is State.RESIDENT
        )
        return victim is not None and victim in held

    def _make_room(self, size: int, keep: frozenset[Key]) -> bool:
        """Whether a slot is free, if need be because something has left it."""
        if self._free[size]:
            return True
        victim = self._policies[size].victim(lambda key: key not in keep and self._may_evict(key))
        if victim is None:
            return False
        self._evict(victim)
        return True

    def _may_evict(self, key: Key) -> bool:
        entry = self._entries[key]
        return entry.pins == 0 and entry.state is State.RESIDENT

    def _evict(self, victim: Key) -> None:
        entry = self._entries[victim]
        if entry.is_prefetched:  # the flag is cleared on first use
            self.statistics.prefetch_wasted_bytes += entry.record_bytes
        self.statistics.evictions += 1
        self._remove(victim, entry)

    def _remove(self, key: Key, entry: Entry) -> None:
        entry.error = None  # its traceback leads here: slots would stay until a collection
        self._filler.note_use(entry.record_bytes, entry.slot, entry.last_use)
        try:
            del self._entries[key]
            self._policies[entry.record_bytes].forget(key)
            self._free[entry.record_bytes].append(entry.slot)
        except BaseException:  # Ctrl-C may come at any line: go through with it
            self._give_up(key, entry)
            raise

    def _count_use(self, key: Key, entry: Entry, is_miss: bool) -> None:
        self._policies[entry.record_bytes].use(key)
        statistics = self.statistics
        if is_miss:
            statistics.misses += 1
            return
        is_here = self._is_here(entry)
        statistics.hits += is_here
        statistics.misses += not is_here
        if entry.is_prefetched:
            if is_here:
                statistics.prefetch_useful_bytes += entry.record_bytes
            else:
                statistics.prefetch_late_bytes += entry.record_bytes
            entry.is_prefetched = False

    def _is_here(self, entry: Entry) -> bool:
        """Whether an acquired expert's bytes are there; once they are, nobody asks again."""
        if entry.state is not State.RESIDENT:
            return False
        if entry.arrival is not None and self._transfer.has_arrived(entry.arrival):
            entry.arrival = None
        return entry.arrival is None

    # -- outside the lock -------------------------------------------------------------------------

    def _require(self, entries: Iterable[Entry]) -> None:
        """Kernels to come need the bytes of these."""
        for entry in entries:
            if entry.arrival is not None:
                self._transfer.require(entry.arrival)

    def _wait(self, entry: Entry) -> None:
        if entry.ready.is_set():
            return
        start = time.perf_counter()
        entry.ready.wait()
        with self._lock:
            self.statistics.stall_seconds += time.perf_counter() - start

    def _begin_load(self, key: Key, entry: Entry, *, is_filling: bool = False) -> None:
        """Have a reader fill the slot of a new entry; without readers, or from RAM, fill it."""
        is_near = not is_filling and self._filler.is_in_ram(key)
        if self._readers is None or is_near:
            self._load(key, entry, is_demand=not is_filling, is_filling=is_filling)
            if entry.error is not None and not isinstance(entry.error, Exception):
                raise entry.error  # Ctrl-C is for now, not for who waits
            return
        self._readers.submit(self._load_begun, key, entry, is_filling)

    def _load_begun(self, key: Key, entry: Entry, is_filling: bool) -> None:
        with self._lock:
            if entry.state is not State.LOADING:  # Ctrl-C came first: the slot may be another's
                return
            entry.is_begun = True
        self._load(key, entry, is_demand=False, is_filling=is_filling)

    def _load(
        self, key: Key, entry: Entry, *, is_demand: bool, is_filling: bool = False
    ) -> Mark | None:
        """Fill the slot of a new entry; when it is there, unless that is now."""
        start, num_bytes = time.perf_counter(), self._store.read_bytes(key)
        arrival, was_in_ram = None, False
        try:
            arrival, was_in_ram = self._filler.fill(key, entry.slot, uses_ram=not is_filling)
        except BaseException as error:
            entry.error = error
        end = time.perf_counter()
        try:
            with self._lock:
                entry.arrival = arrival
                entry.state = State.RESIDENT if entry.error is None else State.FAILED
                self._count_read(num_bytes, start, end)
                self.statistics.host_hits += was_in_ram
                self.statistics.stall_seconds += end - start if is_demand else 0.0
                is_given_up = entry.is_begun and entry.pins == 0 and not is_filling
                if entry.state is State.FAILED and is_given_up:
                    self._remove(key, entry)  # who asked has let go of it: nobody else would
                self._changed.notify_all()
        finally:
            entry.ready.set()
        return arrival

    def _count_read(self, num_bytes: int, start: float, end: float) -> None:
        """Seconds of reads at the same time count once."""
        self.statistics.page_in_bytes += num_bytes
        self.statistics.page_in_seconds += max(0.0, end - max(start, self._read_until))
        self._read_until = max(self._read_until, end)
