"""Who gets the memory that experts may have: slots for all of them, or shadows and fewer slots."""

from __future__ import annotations

from dataclasses import dataclass

from edge_moe.budget import non_expert_bytes
from edge_moe.plan import MemoryTerm
from edge_moe.runtime.allotment import Slots, allot, record_sizes
from edge_moe.runtime.expert_store import ExpertStore
from edge_moe.runtime.shadow_store import BodyStore, shadow_term
from edge_moe.spec import ModelSpec


@dataclass(frozen=True)
class Limits:
    """What was asked for: at most one of the two."""

    budget_bytes: int | None
    num_slots: int | None

    @property
    def has_any(self) -> bool:
        return self.budget_bytes is not None or self.num_slots is not None


@dataclass(frozen=True)
class Allotment:
    """Slots, and what they are for."""

    slots: Slots
    terms: list[MemoryTerm]
    """The bill with every kept expert resident, and the shadows where they are in memory."""
    bodies: BodyStore | None = None
    """What is paged, where shadows are in memory; else all experts are."""
    shadows: ExpertStore | None = None


def allot_experts(
    spec: ModelSpec,
    store: ExpertStore,
    shadows: ExpertStore | None,
    terms: list[MemoryTerm],
    limits: Limits,
) -> Allotment:
    """Slots for the experts of `store`; where those page, slots beside all of its `shadows`.

    Raises:
        BudgetError, InputError: as `allot`.
    """
    budget, num_slots = limits.budget_bytes, limits.num_slots
    if shadows is None or _all_fit(store, terms, limits):
        return Allotment(allot(spec, record_sizes(store), terms, budget, num_slots), terms)
    bodies = BodyStore(store, shadows)
    place = [term.name for term in terms].index("experts") + 1
    billed = [*terms[:place], shadow_term(shadows), *terms[place:]]
    sizes = bodies.paged_sizes()
    if not any(sizes):  # shadows are all there is
        return Allotment(Slots({}, 0, False, False), billed, bodies, shadows)
    return Allotment(allot(spec, sizes, billed, budget, num_slots), billed, bodies, shadows)


def _all_fit(store: ExpertStore, terms: list[MemoryTerm], limits: Limits) -> bool:
    """Whether every expert of `store` has a slot within `limits`, without shadows."""
    if limits.num_slots is not None:
        return limits.num_slots >= len(store.keys())
    if limits.budget_bytes is None:
        return True
    every_bytes = sum(map(sum, record_sizes(store)))
    return limits.budget_bytes >= non_expert_bytes(terms) + every_bytes
