"""Places for packed experts in fast memory: preallocated, so that the byte budget is hard.

A size class is one record size. Each class is one buffer of equal slots; if everything fits, every
expert has its slot and nothing ever pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_moe.errors import BudgetError, InputError
from edge_moe.units import format_bytes

if TYPE_CHECKING:
    import torch

_CLASS_ALIGNMENT_BYTES = 256
"""Where the slots of a class start, as CUDA aligns its own allocations."""


@dataclass(frozen=True)
class SizeClass:
    """Experts whose records have the same size."""

    record_bytes: int
    num_experts: int
    most_in_a_layer: int


def size_classes(records_per_layer: Sequence[Sequence[int]]) -> list[SizeClass]:
    """Size classes of [L][rows] record sizes, smallest records first."""
    total = Counter(size for layer in records_per_layer for size in layer)
    most: Counter[int] = Counter()
    for layer in records_per_layer:
        for size, count in Counter(layer).items():
            most[size] = max(most[size], count)
    return [SizeClass(size, total[size], most[size]) for size in sorted(total)]


def smallest_slot_bytes(classes: Sequence[SizeClass], top_k: int) -> int:
    """Slot bytes below which one token's experts of a layer do not fit at once."""
    return sum(_fewest(size_class, top_k) * size_class.record_bytes for size_class in classes)


def allot_by_bytes(classes: Sequence[SizeClass], slot_bytes: int, top_k: int) -> dict[int, int]:
    """Slots per record size within `slot_bytes`.

    Every class gets what one token may need of it in one layer; the rest goes round, one slot at a
    time, to the class that holds the smallest share of its experts.

    Raises:
        BudgetError: less than `smallest_slot_bytes`; `minimum_bytes` counts slots only.
    """
    needed = smallest_slot_bytes(classes, top_k)
    if slot_bytes < needed:
        raise BudgetError(
            f"{format_bytes(slot_bytes)} for experts is less than one token's top-{top_k} "
            f"experts need at once ({format_bytes(needed)})",
            minimum_bytes=needed,
        )
    if slot_bytes >= sum(item.num_experts * item.record_bytes for item in classes):
        return {item.record_bytes: item.num_experts for item in classes}
    slots = {item.record_bytes: _fewest(item, top_k) for item in classes}
    return _spread(classes, slots, bytes_left=slot_bytes - needed)


def allot_by_count(classes: Sequence[SizeClass], num_slots: int) -> dict[int, int]:
    """Slots per record size, `num_slots` in all, or one per expert if that is less.

    Experts of a layer are computed one after another, so one slot per size is enough.

    Raises:
        InputError: fewer slots than record sizes.
    """
    if num_slots < len(classes):
        raise InputError(
            f"{num_slots} slots are fewer than the {len(classes)} sizes of experts: give at least "
            f"{len(classes)}"
        )
    slots = {item.record_bytes: 1 for item in classes}
    missing = num_slots - len(classes)
    largest = max(item.record_bytes for item in classes)
    return _spread(classes, slots, bytes_left=missing * largest, count_left=missing)


def allot_within(classes: Sequence[SizeClass], num_bytes: int) -> dict[int, int]:
    """As many places per record size as `num_bytes` hold, spread as `allot_by_bytes` does.

    Nothing has to fit: this is for memory beside the slots.
    """
    return _spread(classes, {item.record_bytes: 0 for item in classes}, bytes_left=num_bytes)


def _fewest(size_class: SizeClass, top_k: int) -> int:
    return min(top_k, size_class.most_in_a_layer)


def _spread(
    classes: Sequence[SizeClass],
    slots: dict[int, int],
    bytes_left: int,
    count_left: int | None = None,
) -> dict[int, int]:
    """Give out what is left, always to the class with the smallest share of its experts."""
    while count_left is None or count_left > 0:
        open_classes = [
            item
            for item in classes
            if slots[item.record_bytes] < item.num_experts and item.record_bytes <= bytes_left
        ]
        if not open_classes:
            break
        poorest = min(open_classes, key=lambda item: slots[item.record_bytes] / item.num_experts)
        slots[poorest.record_bytes] += 1
        bytes_left -= poorest.record_bytes
        count_left = None if count_left is None else count_left - 1
    return slots


class SlotBuffers:
    """The memory of all slots, one slab: uint8 [slots, record_bytes] per size class."""

    def __init__(
        self,
        slots: Mapping[int, int],
        device: torch.device,
        allocate: Callable[[int], torch.Tensor] | None = None,
    ) -> None:
        """`allocate` gives uint8 memory of a size, instead of torch."""
        import torch  # the arithmetic above serves the simulator, which needs none

        starts, end = {}, 0
        for record_bytes, count in slots.items():
            starts[record_bytes] = end + -end % _CLASS_ALIGNMENT_BYTES
            end = starts[record_bytes] + record_bytes * count
        if allocate is None or not end:
            slab = torch.empty(end, dtype=torch.uint8, device=device)
        else:
            slab = allocate(end)
        self._buffers = {
            size: slab[start : start + size * slots[size]].view(slots[size], size)
            for size, start in starts.items()
        }
        self.counts = dict(slots)

    @property
    def num_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers.values())

    def buffer(self, record_bytes: int) -> torch.Tensor:
        """uint8 [slots, record_bytes] of one size class."""
        return self._buffers[record_bytes]

    def view(self, record_bytes: int, slot: int) -> torch.Tensor:
        """uint8 [record_bytes] of one slot."""
        return self._buffers[record_bytes][slot]
