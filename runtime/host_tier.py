"""Packed experts in RAM, between the disk and a GPU: what was read stays, the oldest leaves.

One slab, allocated once: a cell per expert, as many of each record size as `limit_bytes` holds.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from edge_moe.runtime.policy import Key
from edge_moe.runtime.slots import SlotBuffers
from edge_moe.runtime.streams import Mark
from edge_moe.runtime.transfer import Fill


@dataclass(eq=False)
class _Cell:
    """One expert in RAM."""

    record_bytes: int
    place: int
    is_filled: bool = False
    holders: int = 0
    copied: Mark | None = None
    """End of the last copy from it to the device."""


class HostTier:
    """LRU within each record size. Thread-safe; what is held never leaves."""

    def __init__(self, buffers: SlotBuffers, wait: Callable[[Mark], None]) -> None:
        """`wait` holds the calling thread until a copy from the tier is done."""
        self.buffers = buffers
        self._wait = wait
        self._cells: OrderedDict[Key, _Cell] = OrderedDict()
        self._free = {size: list(range(count)) for size, count in buffers.counts.items()}
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """RAM of the slab."""
        return self.buffers.num_bytes

    def has(self, key: Key) -> bool:
        """Whether the expert is here, whole."""
        with self._lock:
            cell = self._cells.get(key)
            return cell is not None and cell.is_filled

    def keys(self) -> list[Key]:
        """Every expert that is here, whole."""
        with self._lock:
            return sorted(key for key, cell in self._cells.items() if cell.is_filled)

    def has_room(self, record_bytes: int) -> bool:
        """Whether one more of that size would push nobody out."""
        with self._lock:
            return bool(self._free.get(record_bytes))

    def hold(self, key: Key) -> Tensor | None:
        """uint8 [record_bytes], held until `let_go`; None where the expert is not here."""
        with self._lock:
            cell = self._cells.get(key)
            if cell is None or not cell.is_filled:
                return None
            self._hold(key, cell)
            return self._view(cell)

    def read(self, key: Key, record_bytes: int, fill: Fill) -> Tensor | None:
        """Fill a cell for an expert that is not here; its bytes, held as by `hold`.

        None, and nothing is read, where every cell of the size is held, or there is none. Raises
        what `fill` raises; the cell is free again then.
        """
        cell = self._reserve(key, record_bytes)
        if cell is None:
            return None
        try:
            if cell.copied is not None:
                self._wait(cell.copied)
                cell.copied = None
            record = self._view(cell)
            fill(memoryview(record.numpy().data))
        except BaseException:
            with self._lock:
                del self._cells[key]
                self._free[record_bytes].append(cell.place)
            raise
        with self._lock:
            cell.is_filled = True
        return record

    def let_go(self, key: Key, copied: Mark | None) -> None:
        """Undo one `hold` or `read`; the cell is not overwritten before `copied` is reached."""
        with self._lock:
            cell = self._cells[key]
            cell.holders -= 1
            if copied is not None:
                cell.copied = copied

    # -- as `packed_experts.SlotHolder` -----------------------------------------------------------

    def acquire_residents(self, keys: Sequence[Key]) -> list[int] | None:
        """Places of all of `keys`, held; None, and nothing done, where one is not here."""
        with self._lock:
            found = [self._cells.get(key) for key in keys]
            places = [cell.place for cell in found if cell is not None and cell.is_filled]
            if len(places) < len(keys):
                return None
            for key in keys:
                self._hold(key, self._cells[key])
            return places

    def begin_beside(self, key: Key, held: Collection[Key]) -> int | None:
        """The expert's place, held.

        Raises:
            KeyError: it is not here.
        """
        places = self.acquire_residents([key])
        if places is None:
            raise KeyError(key)
        return places[0]

    def here(self, keys: Iterable[Key]) -> list[Key]:
        """All of them: what is held here is whole."""
        return list(keys)

    def wait_for(self, keys: Iterable[Key]) -> None:
        """Nobody has to."""

    def release_residents(self, keys: Collection[Key]) -> None:
        """Undo one `acquire_residents`."""
        for key in keys:
            self.let_go(key, None)

    def slot(self, key: Key, slot: int) -> Tensor:
        """uint8 [record_bytes] at a place that was acquired."""
        with self._lock:
            return self.buffers.view(self._cells[key].record_bytes, slot)

    # -- private ----------------------------------------------------------------------------------

    def _reserve(self, key: Key, record_bytes: int) -> _Cell | None:
        """A held cell that is not filled yet, with the copy that must be done before it is."""
        with self._lock:
            if key in self._cells:
                return None
            free, copied = self._free.get(record_bytes), None
            if not free:
                oldest = self._oldest(record_bytes)
                if oldest is None:
                    return None
                evicted = self._cells.pop(oldest)
                copied, free = evicted.copied, [evicted.place]
            cell = _Cell(record_bytes, free.pop(), holders=1, copied=copied)
            self._cells[key] = cell
            return cell

    def _oldest(self, record_bytes: int) -> Key | None:
        for key, cell in self._cells.items():
            if cell.record_bytes == record_bytes and not cell.holders:
                return key
        return None

    def _hold(self, key: Key, cell: _Cell) -> None:
        cell.holders += 1
        self._cells.move_to_end(key)

    def _view(self, cell: _Cell) -> Tensor:
        return self.buffers.view(cell.record_bytes, cell.place)
