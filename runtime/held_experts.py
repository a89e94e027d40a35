"""Experts of one layer that are held in their slots at the same time, and read side by side.

They are asked for in one order, and one that would have to leave for another is computed before: so
whoever goes through them pages alike.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Generator, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from edge_moe.runtime.policy import Key
from edge_moe.runtime.products import Member


class SlotHolder(Protocol):
    """Keeps packed experts in equal places of the CPU's memory, as `ExpertCache` does."""

    def begin_beside(self, key: Key, held: Collection[Key]) -> int | None: ...

    def here(self, keys: Iterable[Key]) -> list[Key]: ...

    def wait_for(self, keys: Iterable[Key]) -> None: ...

    def acquire_residents(self, keys: Sequence[Key]) -> list[int] | None: ...

    def release_residents(self, keys: Collection[Key]) -> None: ...

    def slot(self, key: Key, slot: int) -> Tensor: ...


class HeldExperts:
    """Experts of one layer that are held at the same time."""

    def __init__(self, cache: SlotHolder, layer: int) -> None:
        self.members: list[Member] = []
        self.slots: dict[int, int] = {}
        """By router row."""
        self._cache = cache
        self._layer = layer
        self._held: dict[Key, None] = {}
        self._is_waiting = False
        """Whether a member may not be there yet."""

    @property
    def num_rows(self) -> int:
        """Pairs of all members."""
        return self.members[-1].stop - self.members[0].start if self.members else 0

    def hold(self, member: Member) -> bool:
        """Keep an expert in its slot, into which it may still be read; see `wait_for`.

        False where a member would be evicted for it.
        """
        key = self._layer, member.row
        slot = self._cache.begin_beside(key, self._held)
        if slot is None:
            return False
        self._held[key] = None
        self._is_waiting = True
        self.slots[member.row] = slot
        self.members.append(member)
        return True

    def hold_residents(self, members: Sequence[Member]) -> bool:
        """Keep them all if all have slots; else hold none, and False."""
        keys = [(self._layer, member.row) for member in members]
        slots = self._cache.acquire_residents(keys)
        if slots is None:
            return False
        self._held = dict.fromkeys(keys)
        self.slots = {key[1]: slot for key, slot in zip(keys, slots, strict=True)}
        self.members.extend(members)
        return True

    def absent(self) -> set[int]:
        """Rows of members that are still being read."""
        if not self._is_waiting:
            return set()
        here = set(self._cache.here(self._held))
        return {row for layer, row in self._held if (layer, row) not in here}

    def wait_for(self, members: Sequence[Member]) -> None:
        """Until they are in their slots.

        Raises:
            PackageError, OSError: one could not be read.
        """
        if self._is_waiting:
            self._cache.wait_for([(self._layer, member.row) for member in members])

    def packed(self, member: Member) -> Tensor:
        """uint8 [record_bytes]"""
        return self._cache.slot((self._layer, member.row), self.slots[member.row])

    def release(self) -> None:
        """Let go of all."""
        self._is_waiting = False
        self._cache.release_residents(self._held)
        self._held.clear()
        self.slots.clear()
        self.members.clear()


def held_groups(
    cache: SlotHolder, layer: int, members: Sequence[Member], most_rows: int = sys.maxsize
) -> Generator[HeldExperts]:
    """Members that the slots hold at once, held while the caller computes them.

    Of more than one, all have at most `most_rows` pairs together.
    """
    group = HeldExperts(cache, layer)
    try:
        if members and members[-1].stop <= most_rows and group.hold_residents(members):
            yield group
            return
        for member in members:
            num_rows = group.num_rows + member.stop - member.start
            has_room = num_rows <= most_rows or not group.members
            if not (has_room and group.hold(member)):
                yield group
                group.release()
                group.hold(member)
        if group.members:
            yield group
    finally:
        group.release()
