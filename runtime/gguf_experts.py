"""The experts of a GGUF model, paged into memory of our own before their matrices are used.

Bookkeeping belongs to one thread, the one that decodes. An expert's rows of a tensor are read,
given back and handed on as whole pages, which belong to no other expert.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edge_moe.errors import InputError
from edge_moe.gguf_model import GgufModel
from edge_moe.runtime.direct_queue import open_direct_queue
from edge_moe.runtime.gguf_allotment import expert_sizes
from edge_moe.runtime.gguf_slices import Place, Slice, SliceFiles, expert_slices
from edge_moe.runtime.guesses import Guesses
from edge_moe.runtime.idle_link import IdleLink
from edge_moe.runtime.llama_region import ExpertRegion
from edge_moe.runtime.policy import (
    EvictionPolicy,
    Key,
    LeastRecentlyUsed,
    PagingStatistics,
)
from edge_moe.runtime.read_queue import READERS, Read, ReadQueue, ThreadQueue

_FILLED_TOGETHER = 16
"""Experts."""


@dataclass(eq=False)
class _Entry:
    """One expert that has memory."""

    reads: list[Read[Slice] | None]
    """By tensor, of an expert that is not known to be whole; None is not asked for yet."""
    is_prefetched: bool = False

    @property
    def asked(self) -> list[Read[Slice]]:
        return [read for read in self.reads if read is not None]

    @property
    def is_loading(self) -> bool:
        return any(not read.is_done for read in self.asked)

    @property
    def has_failed(self) -> bool:
        return any(read is not None and read.error is not None for read in self.reads)

    @property
    def is_whole(self) -> bool:
        return all(read is not None and read.is_done for read in self.reads)


class GgufExperts:
    """Pages experts in and out under `limit_bytes`.

    `require` starts to read what a router chose, the tensors in the order of their use; `wait`
    waits for one tensor's part of it, so that the others are read while that one computes.
    """

    def __init__(
        self,
        model: GgufModel,
        region: ExpertRegion,
        limit_bytes: int,
        policy: type[EvictionPolicy],
        places: Mapping[str, Place] | None = None,
    ) -> None:
        """`region` holds the model's expert tensors, loaded and settled.

        Those named in `places` are read from there.

        Raises:
            OSError: a file cannot be opened.
        """
        self.limit_bytes = limit_bytes
        self.statistics = PagingStatistics()
        self.layer_ids = tuple(sorted(model.layers))
        self._region = region
        places = places or {}
        sizes = expert_sizes(model, {name: offset for name, (_, offset) in places.items()})
        self._sizes = {
            (layer, row): size for layer, rows in enumerate(sizes) for row, size in enumerate(rows)
        }
        # where nothing ever leaves, the order that takes next to no memory and time
        self._policy = (policy if self.is_paging else LeastRecentlyUsed)()
        self._slices = expert_slices(model, region, places, are_apart=self.is_paging)
        self._files = SliceFiles({each.path for rows in self._slices.values() for each in rows})
        self._order = [
            list(range(len(self._slices[layer, 0]))) for layer in range(len(self.layer_ids))
        ]
        self._entries: dict[Key, _Entry] = {}
        self._loading: set[Key] = set()
        """Those that are not known to be whole."""
        self._awaited: list[Key] = []
        """... of which the layer that computes needs these."""
        self._used_bytes = 0
        self._is_changed = False
        """Whether files were written to: experts may be of another model."""
        self._spare: dict[int, list[Slice]] = {}
        """By tensor: pages of experts that have just left."""
        self._queue = self._open_queue()
        self._guesses = Guesses()
        self._link = IdleLink()
        self._failed: set[Key] = set()
        """Guesses that did not come true, while they are still being read."""

    def _open_queue(self) -> ReadQueue[Slice]:
        slices = sorted(
            (each for rows in self._slices.values() for each in rows), key=lambda each: each.number
        )
        direct = open_direct_queue(self._files, slices)
        self._region.give_back(slices[0].address, slices[0].end)  # it was tried out with that
        return direct or ThreadQueue(self._files.read, READERS, "edge-moe-page-in")

    def num_bytes(self, key: Key) -> int:
        """What an expert takes in memory: whole pages."""
        return self._sizes[key]

    @property
    def total_bytes(self) -> int:
        """What all experts would take."""
        return sum(self._sizes.values())

    @property
    def is_paging(self) -> bool:
        """Whether there is less memory than experts."""
        return self.total_bytes > self.limit_bytes

    @property
    def used_bytes(self) -> int:
        """What the experts in memory take."""
        return self._used_bytes

    def set_order(self, layer: int, order: Sequence[int]) -> None:
        """The order in which a layer uses its tensors: indices into the layer's slices."""
        self._order[layer] = list(order)

    def require(self, layer: int, rows: Sequence[int]) -> None:
        """Begin to bring the experts `rows` of the MoE layer with index `layer` into memory.

        Each tensor of them is there once `wait` has returned.

        Raises:
            InputError: they do not fit together.
            CheckpointError: the file has changed.
        """
        now = time.perf_counter()
        before, self._awaited = [self._entries[key] for key in self._awaited], []
        keys = [(layer, row) for row in rows]
        keep = frozenset(keys)
        self._require_room(keep)
        if self._loading:
            self._queue.go_on()
            self._drop_guesses(layer, keep)
        present = [row for row in rows if self._use((layer, row))]
        if present:
            self._policy.use_all(layer, present)
        missing = [key for key in keys if key not in self._entries]
        self._begin_reads(layer, missing, keep)
        # what comes now has time while the disk reads
        self._awaited = [key for key in keys if key in self._loading]
        for key in missing:
            self._policy.admit(key)
        for index in self._order[layer]:
            for key in self._awaited:
                self._ask(key, index, is_wanted=True)
            self._queue.go_on()
        if missing:
            self._policy.use_all(layer, [row for _, row in missing])
        if missing or self._is_changed:
            self.require_unchanged()
        self._guesses.score(layer, rows, self.statistics)
        self._link.end([read for entry in before for read in entry.asked], now)
        self._link.begin(now)
        self._settle()

    def _begin_reads(self, layer: int, missing: Sequence[Key], keep: frozenset[Key]) -> None:
        """Take memory, and have the disk begin with the first matrix of the first expert."""
        for at, key in enumerate(missing):
            self._wait_for_room(self._sizes[key], keep)
            self._take(key, is_prefetched=False)
            if at == 0:
                self._ask(key, self._order[layer][0], is_wanted=True)
                self._queue.go_on()

    def _require_room(self, keep: frozenset[Key]) -> None:
        if sum(self._sizes[key] for key in keep) > self.limit_bytes:
            raise InputError(
                f"{len(keep)} experts of a layer do not fit {self.limit_bytes} bytes together: "
                "raise the budget"
            )

    def require_unchanged(self) -> None:
        """What was read so far is of the files that were opened; ask before results are used.

        Raises:
            CheckpointError: one has changed; from then on it is raised by `require`, too.
        """
        self._is_changed = True
        self._files.require_unchanged()
        self._is_changed = False

    def is_late(self, index: int) -> bool:
        """Whether the tensor `index` of what was required is still being read."""
        if not self._awaited:
            return False
        self._queue.go_on()
        reads = (self._entries[key].reads[index] for key in self._awaited)
        return any(read is None or not read.is_done for read in reads)

    def wait(self, index: int) -> None:
        """Until the tensor `index` of all that was required is there.

        Raises:
            CheckpointError: the file ends early.
            OSError: it cannot be read.
        """
        if not self._awaited:
            return
        start = time.perf_counter()
        reads = [self._ask(key, index, is_wanted=True) for key in self._awaited]
        self._queue.wait(reads)
        self.statistics.stall_seconds += time.perf_counter() - start
        errors = [read.error for read in reads if read.error is not None]
        if errors:
            failed = [key for key, read in zip(self._awaited, reads, strict=True) if read.error]
            self._awaited = []
            for key in failed:
                self._abandon(key)
            raise errors[0]

    def wait_for_all(self, layer: int) -> None:
        """As `wait`, for every tensor of the layer."""
        for index in self._order[layer]:
            self.wait(index)

    def prefetch(self, layer: int, rows: Iterable[int], current: Iterable[Key]) -> None:
        """Start to read guessed experts of `layer`; `current` are in use and stay.

        Never waits, and gives up where nothing can leave.
        """
        keys = [(layer, row) for row in rows]
        misses = [key for key in keys if key not in self._entries]
        self._guesses.remember(layer, (row for _, row in misses))
        keep = frozenset([*keys, *current])
        spare_bytes = self._link.spare_bytes(is_reading=bool(self._awaited))
        for at, key in enumerate(misses):
            if self._slices[key][self._order[layer][0]].num_bytes > spare_bytes:
                self.statistics.prefetch_rejected += len(misses) - at
                break
            if self._make_room(self.num_bytes(key), keep):
                self._reserve(key, is_prefetched=True)
                spare_bytes = self._read_ahead(key, spare_bytes)
                self._give_back_spare()
        self._queue.go_on()

    def _read_ahead(self, key: Key, spare_bytes: int) -> int:
        """Read a guess's tensors, in the order of their use, as far as they fit; what is left."""
        for index in self._order[key[0]]:
            num_bytes = self._slices[key][index].num_bytes
            if num_bytes > spare_bytes:
                break
            self._ask(key, index, is_wanted=False)
            self.statistics.prefetch_issued_bytes += num_bytes
            spare_bytes -= num_bytes
        return spare_bytes

    def fill(self) -> None:
        """Read all experts in layer order, where all fit: before that nothing was read."""
        self._region.take_large_pages()
        keys = list(self._slices)
        for start in range(0, len(keys), _FILLED_TOGETHER):
            batch = keys[start : start + _FILLED_TOGETHER]
            for key in batch:
                self._reserve(key, is_prefetched=False)
                for index in self._order[key[0]]:
                    self._ask(key, index, is_wanted=True)
            self._wait_for_batch(batch)
        self.statistics = PagingStatistics()

    def check_integrity(self) -> None:
        """Raise RuntimeError if the bookkeeping is inconsistent or over its limit."""
        used = sum(map(self.num_bytes, self._entries))
        if used != self._used_bytes or used > self.limit_bytes:
            raise RuntimeError(
                f"experts take {used} bytes, {self._used_bytes} are booked, "
                f"{self.limit_bytes} allowed"
            )
        if not self._loading <= self._entries.keys():
            raise RuntimeError("experts are being read that have no memory")

    def close(self) -> None:
        """Stop reading and close the files."""
        self._queue.close()
        self._files.close()

    # ------------------------------------------------------------------ one expert

    def _use(self, key: Key) -> bool:
        """Whether `key` has memory; counts what the model asked for."""
        entry = self._entries.get(key)
        if entry is not None and entry.has_failed:  # a guess: whoever needs it has it read again
            self._drop(key)
            entry = None
        statistics = self.statistics
        statistics.routed_experts += 1
        if entry is None:
            statistics.misses += 1
            return False
        statistics.hits += entry.is_whole
        statistics.misses += not entry.is_whole
        if entry.is_prefetched:
            entry.is_prefetched = False
            if entry.is_loading:
                statistics.prefetch_late_bytes += self._asked_bytes(key)
            else:
                statistics.prefetch_useful_bytes += self._asked_bytes(key)
        return True

    def _asked_bytes(self, key: Key) -> int:
        """What was read, or will be."""
        entry = self._entries[key]
        if key not in self._loading:
            return self.num_bytes(key)
        return sum(read.piece.num_bytes for read in entry.asked)

    def _reserve(self, key: Key, *, is_prefetched: bool) -> None:
        """Take memory, for which there is room, and tell the policy."""
        self._take(key, is_prefetched=is_prefetched)
        self._policy.admit(key)

    def _take(self, key: Key, *, is_prefetched: bool) -> None:
        self._used_bytes += self._sizes[key]
        self._entries[key] = _Entry([None] * len(self._slices[key]), is_prefetched)
        self._loading.add(key)

    def _ask(self, key: Key, index: int, *, is_wanted: bool) -> Read[Slice]:
        """The read of a tensor's part, which is queued if it was not."""
        reads = self._entries[key].reads
        read = reads[index]
        if read is None:
            piece = self._slices[key][index]
            self._take_memory(piece, index)
            read = reads[index] = self._queue.submit(piece, is_wanted=is_wanted)
        elif is_wanted:
            self._queue.want(read)
        return read

    def settle(self) -> None:
        """Nobody waits any more: note what has arrived since; what could not be read is gone."""
        self._link.forget()
        self._awaited = []
        if self._loading:
            self._queue.go_on()
        self._settle()

    def _settle(self) -> None:
        for key in [key for key in self._failed if not self._entries[key].is_loading]:
            self._waste(key)
        done = [
            key for key in self._loading if key not in self._awaited and self._entries[key].is_whole
        ]
        for key in done:
            if self._entries[key].has_failed:
                self._drop(key)
            else:
                self._note_read(key)
        self._give_back_spare()

    def _note_read(self, key: Key) -> None:
        """It is whole."""
        self._loading.discard(key)
        entry = self._entries[key]
        reads, entry.reads = entry.asked, []
        seconds = max(read.end_seconds for read in reads)
        seconds -= min(read.start_seconds for read in reads)
        self.statistics.page_in_bytes += self._sizes[key]
        self.statistics.page_in_seconds += seconds

    def _abandon(self, key: Key) -> None:
        """Give up an expert: its memory is free once nothing reads into it."""
        asked = self._entries[key].asked
        self._queue.wait([read for read in asked if not self._queue.cancel(read)])
        self._drop(key)

    def _wait_for_batch(self, keys: list[Key]) -> None:
        self._awaited = keys
        for index in range(max(len(self._slices[key]) for key in keys)):
            self.wait(index)
        self.settle()

    # ------------------------------------------------------------------ room

    def _make_room(self, size: int, keep: frozenset[Key]) -> bool:
        """Evict until `size` more bytes fit; False where nothing can leave."""

        def may_evict(key: Key) -> bool:
            return key not in keep and not self._entries[key].is_loading

        while self._used_bytes + size > self.limit_bytes:
            victim = self._policy.victim(may_evict)
            if victim is None:
                self._give_back_spare()
                return False
            self._evict(victim)
        return True

    def _wait_for_room(self, size: int, keep: frozenset[Key]) -> None:
        """As `_make_room`; where only guesses on their way are left to leave, they are given up."""
        while not self._make_room(size, keep):
            guess = next(key for key in self._loading if key not in keep)
            self._cancel(guess)
            start = time.perf_counter()
            self._queue.wait(self._entries[guess].asked)
            self.statistics.stall_seconds += time.perf_counter() - start

    def _take_memory(self, piece: Slice, index: int) -> None:
        """Give a part of an expert the pages of one that left for it.

        Where that cannot be, what has left gives its memory back before more is taken.
        """
        spare = self._spare.get(index, [])
        at = next((at for at, each in enumerate(spare) if each.num_bytes == piece.num_bytes), None)
        if at is not None:
            source = spare[at]
            if self._region.move(source.address, piece.address, piece.num_bytes):
                del spare[at]
                return
        self._give_back_spare()

    def _give_back_spare(self) -> None:
        for spare in self._spare.values():
            for each in spare:
                self._region.give_back(each.address, each.end)
        self._spare.clear()

    def _evict(self, key: Key) -> None:
        if key in self._loading and self._entries[key].is_whole:
            self._note_read(key)
        if self._entries[key].is_prefetched:
            self.statistics.prefetch_wasted_bytes += self._asked_bytes(key)
        self.statistics.evictions += 1
        self._remove(key)

    def _drop(self, key: Key) -> None:
        self._remove(key)
        self._give_back_spare()

    def _remove(self, key: Key) -> None:
        """Its pages are spare then."""
        del self._entries[key]
        self._loading.discard(key)
        self._failed.discard(key)
        self._policy.forget(key)
        self._used_bytes -= self.num_bytes(key)
        for index, each in enumerate(self._slices[key]):
            self._spare.setdefault(index, []).append(each)

    # ------------------------------------------------------------------ guesses

    def _drop_guesses(self, layer: int, chosen: frozenset[Key]) -> None:
        """The router of `layer` has chosen otherwise: what was not read of guesses never is.

        Their memory is for those that it chose.
        """
        self._failed -= chosen
        for key in [key for key in self._loading if key[0] == layer and key not in chosen]:
            self._cancel(key)
            if self._entries[key].is_loading:
                self._failed.add(key)
            else:
                self._waste(key)

    def _waste(self, key: Key) -> None:
        """A part of an expert was read for nothing."""
        self.statistics.prefetch_wasted_bytes += self._asked_bytes(key)
        self._remove(key)

    def _cancel(self, key: Key) -> None:
        """What was not begun of a guess is not read."""
        reads = self._entries[key].reads
        for index, read in enumerate(reads):
            if read is not None and self._queue.cancel(read):
                self.statistics.prefetch_issued_bytes -= read.piece.num_bytes
                reads[index] = None
