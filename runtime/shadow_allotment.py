"""Who gets the memory that experts may have: slots for all of them, or shadows and fewer slots."""

from __future__ import annotations

from dataclasses import dataclass

from edge_moe.plan import Device, MemoryTerm
from edge_moe.runtime.allotment import Slots, all_fit, allot, paging_terms, record_sizes
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
    """The bill with every kept expert resident, and the shadows where they are in memory, and
    what paging takes besides where experts page."""
    bodies: BodyStore | None = None
    """What is paged, where shadows are in memory; else all experts are."""
    shadows: ExpertStore | None = None


def allot_experts(
    spec: ModelSpec,
    store: ExpertStore,
    shadows: ExpertStore | None,
    terms: list[MemoryTerm],
    limits: Limits,
    device: Device,
) -> Allotment:
    """Slots for the experts of `store`; where those page, slots beside all of its `shadows`.

    Raises:
        BudgetError, InputError: as `allot`.
    """
    budget, num_slots = limits.budget_bytes, limits.num_slots
    sizes = record_sizes(store)
    if shadows is None or all_fit(sizes, terms, budget, num_slots):
        billed = paging_terms(sizes, terms, device, budget, num_slots)
        return Allotment(allot(spec, sizes, billed, budget, num_slots), billed)
    bodies = BodyStore(store, shadows)
    place = [term.name for term in terms].index("experts") + 1
    billed = [*terms[:place], shadow_term(shadows), *terms[place:]]
    sizes = bodies.paged_sizes()
    if not any(sizes):  # shadows are all there is
        return Allotment(Slots({}, 0, False, False), billed, bodies, shadows)
    billed = paging_terms(sizes, billed, device, budget, num_slots)
    return Allotment(allot(spec, sizes, billed, budget, num_slots), billed, bodies, shadows)
