"""The experts of a GGUF model, paged into memory of our own before their layer computes.

Bookkeeping belongs to one thread, the one that decodes; the others only read. An expert's rows of a
tensor are read and given back as whole pages. Neighbours share the page between them: it goes with
the last of them.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from edge_moe.errors import CheckpointError, InputError
from edge_moe.gguf_model import GgufModel
from edge_moe.runtime.gguf_allotment import num_pages
from edge_moe.runtime.guesses import Guesses
from edge_moe.runtime.llama_region import PAGE_BYTES, ExpertRegion
from edge_moe.runtime.policy import EvictionPolicy, Key, PagingStatistics

READERS = 4
"""Threads that read: enough to keep an NVMe disk busy with pieces of half a megabyte."""


@dataclass(frozen=True)
class Slice:
    """An expert's rows of one tensor, as whole pages in memory and in the file."""

    path: Path
    offset: int
    """In the file; a multiple of the page size, as `address` is."""
    address: int
    num_bytes: int
    needed_bytes: int
    """Up to the last byte of the rows: the file may end there."""

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.address + self.num_bytes


@dataclass(eq=False)
class _Entry:
    """One expert that is in memory, or on its way."""

    reads: list[Future[None]] = field(default_factory=list)
    is_prefetched: bool = False
    start: float = 0.0

    @property
    def is_loading(self) -> bool:
        return any(not read.done() for read in self.reads)


class GgufExperts:
    """Pages experts in and out under `limit_bytes`."""

    def __init__(
        self,
        model: GgufModel,
        region: ExpertRegion,
        limit_bytes: int,
        policy: EvictionPolicy,
    ) -> None:
        """`region` holds the model's expert tensors, loaded and settled.

        Raises:
            OSError: a file cannot be opened.
        """
        self.limit_bytes = limit_bytes
        self.statistics = PagingStatistics()
        self.layer_ids = tuple(sorted(model.layers))
        self._region = region
        self._policy = policy
        self._slices = expert_slices(model, region)
        self._files = _Files({each.path for rows in self._slices.values() for each in rows})
        self._entries: dict[Key, _Entry] = {}
        self._loading: set[Key] = set()
        """Whose reads were not waited for."""
        self._used_bytes = 0
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="edge-moe-page-in")
        self._guesses = Guesses()

    def num_bytes(self, key: Key) -> int:
        """What an expert takes in memory: whole pages."""
        return sum(each.num_bytes for each in self._slices[key])

    @property
    def total_bytes(self) -> int:
        """What all experts would take."""
        return sum(map(self.num_bytes, self._slices))

    @property
    def used_bytes(self) -> int:
        """What the experts in memory take."""
        return self._used_bytes

    def require(self, layer: int, rows: Sequence[int]) -> None:
        """Bring the experts `rows` of the MoE layer with index `layer` into memory, and wait.

        Raises:
            InputError: they do not fit together.
            CheckpointError: the file has changed, or ends early.
            OSError: it cannot be read.
        """
        keys = [(layer, row) for row in rows]
        self._guesses.score(layer, rows, self.statistics)
        keep = frozenset(keys)
        missing = [key for key in keys if not self._use(key)]
        start = time.perf_counter()
        if missing:
            self._files.require_unchanged()
        for key in missing:
            self._start(key, keep, is_prefetched=False)
            self._policy.use(key)
        waited = [key for key in keys if key in self._loading]
        errors = [error for key in waited if (error := self._failure(key)) is not None]
        if errors:
            raise errors[0]
        if waited:
            self.statistics.stall_seconds += time.perf_counter() - start

    def prefetch(self, layer: int, rows: Iterable[int], current: Iterable[Key]) -> None:
        """Start to read guessed experts of `layer`; `current` are in use and stay.

        Never waits, and gives up where nothing can leave.
        """
        keys = [(layer, row) for row in rows]
        misses = [key for key in keys if key not in self._entries]
        self._guesses.remember(layer, (row for _, row in misses))
        keep = frozenset([*keys, *current])
        for key in misses:
            size = self.num_bytes(key)
            if not self._guesses.rule.admits(layer, size, self._queued_bytes()):
                self.statistics.prefetch_rejected += 1
            elif self._make_room(size, keep):
                self._start(key, keep, is_prefetched=True)
                self.statistics.prefetch_issued_bytes += size

    def fill(self) -> None:
        """Read experts in layer order as long as they fit."""
        keys = [key for key in self._slices if key not in self._entries]
        batch: list[Key] = []
        for key in keys:
            if self._used_bytes + self.num_bytes(key) > self.limit_bytes:
                break
            self._start(key, frozenset(), is_prefetched=False)
            batch.append(key)
            if len(batch) == 4 * READERS:
                self._finish_all(batch)
        self._finish_all(batch)
        self.statistics = PagingStatistics()

    def check_integrity(self) -> None:
        """Raise RuntimeError if the bookkeeping is inconsistent or over its limit."""
        used = sum(map(self.num_bytes, self._entries))
        if used != self._used_bytes or used > self.limit_bytes:
            raise RuntimeError(
                f"experts take {used} bytes, {self._used_bytes} are booked, "
                f"{self.limit_bytes} allowed"
            )

    def close(self) -> None:
        """Stop reading and close the files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._files.close()

    # ------------------------------------------------------------------ one expert

    def _use(self, key: Key) -> bool:
        """Whether `key` need not be read; counts what the model asked for."""
        entry = self._entries.get(key)
        statistics = self.statistics
        statistics.routed_experts += 1
        if entry is None:
            statistics.misses += 1
            return False
        self._policy.use(key)
        is_late = entry.is_loading
        statistics.hits += not is_late
        statistics.misses += is_late
        if entry.is_prefetched:
            entry.is_prefetched = False
            if is_late:
                statistics.prefetch_late_bytes += self.num_bytes(key)
            else:
                statistics.prefetch_useful_bytes += self.num_bytes(key)
        return True

    def _start(self, key: Key, keep: frozenset[Key], *, is_prefetched: bool) -> None:
        """Make room and begin to read."""
        size = self.num_bytes(key)
        if not self._make_room(size, keep):
            raise InputError(
                f"{len(keep)} experts of a layer do not fit {self.limit_bytes} bytes together: "
                "raise the budget"
            )
        self._used_bytes += size
        self._policy.admit(key)
        entry = self._entries[key] = _Entry([], is_prefetched, time.perf_counter())
        entry.reads = [self._pool.submit(self._files.read, each) for each in self._slices[key]]
        self._loading.add(key)

    def _finish(self, key: Key) -> None:
        """Wait for an expert's reads; after an error it is gone."""
        entry = self._entries[key]
        self._loading.discard(key)
        try:
            for read in entry.reads:
                read.result()
        except BaseException:
            for read in entry.reads:
                if not read.cancel():
                    read.exception()
            self._remove(key)
            raise
        seconds, entry.reads = time.perf_counter() - entry.start, []
        size = self.num_bytes(key)
        self.statistics.page_in_bytes += size
        self.statistics.page_in_seconds += seconds
        self._guesses.rule.learn_transfer(size, seconds)

    def _failure(self, key: Key) -> BaseException | None:
        """Wait for an expert's reads; what went wrong, after which it is gone."""
        try:
            self._finish(key)
        except BaseException as error:
            return error
        return None

    def _finish_all(self, keys: list[Key]) -> None:
        for key in keys:
            self._finish(key)
        keys.clear()

    # ------------------------------------------------------------------ room

    def _make_room(self, size: int, keep: frozenset[Key]) -> bool:
        """Evict until `size` more bytes fit; False where nothing can leave."""

        def may_evict(key: Key) -> bool:
            is_loading = key in self._loading and self._entries[key].is_loading
            return key not in keep and not is_loading

        while self._used_bytes + size > self.limit_bytes:
            victim = self._policy.victim(may_evict)
            if victim is None:
                return False
            self._evict(victim)
        return True

    def _evict(self, key: Key) -> None:
        entry = self._entries[key]
        if key in self._loading and self._failure(key) is not None:
            return  # a guess that nobody asked for, and that could not be read
        if entry.is_prefetched:
            self.statistics.prefetch_wasted_bytes += self.num_bytes(key)
        self.statistics.evictions += 1
        self._remove(key)

    def _remove(self, key: Key) -> None:
        del self._entries[key]
        self._policy.forget(key)
        self._used_bytes -= self.num_bytes(key)
        for index, each in enumerate(self._slices[key]):
            start = self._end_of_neighbour(key, index, each, -1)
            end = self._end_of_neighbour(key, index, each, +1)
            self._region.give_back(start, end)

    def _end_of_neighbour(self, key: Key, index: int, each: Slice, step: int) -> int:
        """How far `each` goes without touching a page of an expert that stays: down, or up.

        Experts of less than a page share it with several.
        """
        layer, row = key
        edge = each.address if step < 0 else each.end
        while (found := self._slices.get((layer, row := row + step))) is not None:
            other = found[index]
            overlaps = other.end > edge if step < 0 else other.address < edge
            if not overlaps:
                break
            if (layer, row) in self._entries:
                return other.end if step < 0 else other.address
        return edge

    # ------------------------------------------------------------------ guesses

    def _queued_bytes(self) -> int:
        loading = (key for key in self._loading if self._entries[key].is_loading)
        return sum(map(self.num_bytes, loading))


def expert_slices(model: GgufModel, region: ExpertRegion) -> dict[Key, list[Slice]]:
    """Where every expert lies: its rows of each tensor of its layer, in file order.

    Neighbours in a tensor may share a page; nothing else shares one.
    """
    found: dict[Key, list[Slice]] = {}
    for layer, layer_id in enumerate(sorted(model.layers)):
        for info in sorted(model.layers[layer_id].stacks, key=lambda each: each.offset):
            address = region.place(info.name, info.offset)
            stride = info.num_bytes // model.spec.num_experts
            for row in range(model.spec.num_experts):
                start = info.offset + row * stride
                skipped = start % PAGE_BYTES
                found.setdefault((layer, row), []).append(
                    Slice(
                        info.path,
                        start - skipped,
                        address + row * stride - skipped,
                        num_pages(info.offset, stride, row) * PAGE_BYTES,
                        skipped + stride,
                    )
                )
    return found


class _Files:
    """The open files of a model, past the page cache where the file system allows."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._descriptors = {path: _open_direct(path) for path in paths}
        self._states = {path: _state(each) for path, each in self._descriptors.items()}

    def require_unchanged(self) -> None:
        """Raise CheckpointError if a file was written to since it was opened."""
        for path, descriptor in self._descriptors.items():
            if _state(descriptor) != self._states[path]:
                raise CheckpointError(
                    f"{path} has changed while it was running: start again with a file that "
                    "nobody writes to"
                )

    def read(self, each: Slice) -> None:
        """Fill a slice's pages.

        Raises:
            CheckpointError: the file ends within it.
            OSError: it cannot be read; names the file.
        """
        descriptor, done = self._descriptors[each.path], 0
        while done < each.needed_bytes:
            target = (ctypes.c_char * (each.num_bytes - done)).from_address(each.address + done)
            try:
                count = os.preadv(descriptor, [target], each.offset + done)
            except OSError as error:
                raise OSError(error.errno, os.strerror(error.errno or 0), str(each.path)) from None
            if count == 0:
                raise CheckpointError(
                    f"{each.path} ended early: it was truncated while it was running; download it "
                    "again"
                )
            done += count

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}


def _open_direct(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # tmpfs and some network file systems
        return os.open(path, os.O_RDONLY)


def _state(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns
