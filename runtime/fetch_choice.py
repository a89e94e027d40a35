"""A missed expert on a GPU: fetched, or computed on the CPU where it lies in RAM?

Integers, floats and keys only, never a tensor: the same code can be asked by a simulator. A layer's
misses are divided so that the slower side is done first:

    seconds = max(cpu, link) + merge
    cpu     = bytes computed there x cpu_seconds_per_byte
    link    = (bytes queued before + bytes fetched) / bandwidth

The bandwidth is that of the link beside a CPU that reads RAM, too, where it does, and merge is what
it costs to hand inputs over, to wait, and to add what comes back; without any computed there it is
nothing.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from edge_moe.errors import InputError
from edge_moe.runtime.interleaved_trial import InterleavedTrial
from edge_moe.runtime.policy import Key

Misses = Literal["auto", "fetch", "cpu"]
"""`auto` asks the prices, and a trial whether they are right; the others always do the same."""

_MOST_SPLITS = 64
"""Compared one by one; where records have many sizes only those that keep the order are."""


@dataclass(frozen=True)
class Prices:
    """Measured on the machine at hand."""

    link_bytes_per_second: float
    """While the CPU is idle."""
    contended_bytes_per_second: float
    """While it computes experts."""
    cpu_seconds_per_byte: float
    """Of packed experts, while the link is busy."""
    merge_seconds: float
    """Per layer in which the CPU computes anything."""

    def seconds(self, cpu_bytes: int, link_bytes: int) -> float:
        """Until a layer's misses are dealt with."""
        if not cpu_bytes:
            return link_bytes / self.link_bytes_per_second
        link = link_bytes / min(self.link_bytes_per_second, self.contended_bytes_per_second)
        return max(cpu_bytes * self.cpu_seconds_per_byte, link) + self.merge_seconds


@dataclass(frozen=True)
class Miss:
    """An expert that a layer needs, and that has no slot."""

    num_bytes: int
    is_in_ram: bool
    """Else it must be fetched: it comes from the disk."""


@dataclass(frozen=True)
class Split:
    """Which of a layer's misses the CPU computes."""

    on_cpu: tuple[int, ...]
    """Positions among the misses, ascending."""
    seconds: float


def split_misses(misses: Sequence[Miss], prices: Prices, queued_bytes: int = 0) -> Split:
    """The division that takes the least time; of equal ones the one that fetches most.

    Of experts of one size the last are computed on the CPU: put those first that deserve a slot.
    """
    total_bytes = queued_bytes + sum(miss.num_bytes for miss in misses)

    def price(on_cpu: tuple[int, ...]) -> tuple[float, int]:
        cpu_bytes = sum(misses[place].num_bytes for place in on_cpu)
        return prices.seconds(cpu_bytes, total_bytes - cpu_bytes), cpu_bytes

    best = min(_divisions(misses), key=price)
    return Split(tuple(sorted(best)), price(best)[0])


def _divisions(misses: Sequence[Miss]) -> Iterator[tuple[int, ...]]:
    """Positions that the CPU might compute; prices do not matter for which are compared."""
    by_size: dict[int, list[int]] = {}
    for place, miss in enumerate(misses):
        if miss.is_in_ram:
            by_size.setdefault(miss.num_bytes, []).insert(0, place)
    if math.prod(len(places) + 1 for places in by_size.values()) <= _MOST_SPLITS:
        counts = itertools.product(*(range(len(places) + 1) for places in by_size.values()))
        for numbers in counts:
            chosen = zip(by_size.values(), numbers, strict=True)
            yield tuple(place for places, number in chosen for place in places[:number])
        return
    possible = [place for place, miss in enumerate(misses) if miss.is_in_ram]
    for start in range(len(possible), -1, -1):
        yield tuple(possible[start:])


def check_misses(misses: str, ram_bytes: int | None) -> None:
    """Refuse what cannot be done.

    Raises:
        InputError: an unknown choice, or experts to be computed in RAM that holds none.
    """
    if misses not in get_args(Misses):
        raise InputError(f"misses {misses!r} are unknown: use {', '.join(get_args(Misses))}")
    if misses == "cpu" and not ram_bytes:
        raise InputError(
            "--misses cpu computes experts that have no slot from RAM beside the slots, which "
            "holds none: add --ram, such as --ram 16GB"
        )


class MissChooser:
    """Decides for one layer of one token after another; belongs to the model's thread."""

    def __init__(self, prices: Prices | None, trial: InterleavedTrial | None = None) -> None:
        """Without `prices` the CPU computes whatever it can; `trial` says when it may at all."""
        self.prices = prices
        self.trial = trial
        self._missed: Counter[Key] = Counter()

    @property
    def label(self) -> str:
        """What it does, for whoever reads the statistics."""
        if self.prices is None:
            return "computed on the CPU"
        verdict = self.trial.verdict if self.trial is not None else True
        if verdict is None:
            return "fetched or computed on the CPU, by turns: too few tokens to say what is faster"
        if not verdict:
            return "fetched: computing some on the CPU was no faster"
        return "fetched or computed on the CPU, by price"

    def choose(self, misses: Sequence[tuple[Key, Miss]], queued_bytes: int = 0) -> tuple[Key, ...]:
        """The experts to compute on the CPU; those missed most often are fetched first."""
        for key, _ in misses:
            self._missed[key] += 1
        if self.trial is not None and not self.trial.is_on:
            return ()
        ordered = sorted(misses, key=lambda item: -self._missed[item[0]])
        if self.prices is None:
            return tuple(key for key, miss in ordered if miss.is_in_ram)
        split = split_misses([miss for _, miss in ordered], self.prices, queued_bytes)
        return tuple(ordered[place][0] for place in split.on_cpu)
