"""Replaying a trace through the runtime's eviction policies: what is paged, computed, and skipped.

No torch and no weights: keys, sizes and the policy's own classes. Without read-ahead the counts are
those of the runtime on the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from edge_moe.errors import InputError
from edge_moe.measurement import SkippingCost
from edge_moe.runtime.expert_store import ExpertStore
from edge_moe.runtime.policy import EvictionPolicy, Key, RoutedCounts
from edge_moe.runtime.skipping import Mask, SkipRule
from edge_moe.runtime.skipping_cost import skipping_cost
from edge_moe.runtime.trace import Trace


class Simulation(BaseModel):
    """What a replay counted. Bytes are packed bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: str
    """The skipping rule, or `none`."""
    policy: str
    num_slots: int
    slot_bytes: int
    num_tokens: int
    num_steps: int
    routed_experts: int
    """Experts that the router chose, over all tokens and layers."""
    skipped_experts: int
    """... of which the rule left out."""
    routed_bytes: int
    """Of the chosen experts, each token counted for itself."""
    skipped_bytes: int
    """... and of those left out, whether they had a slot or not."""
    hits: int
    misses: int
    evictions: int
    page_in_bytes: int

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that had a slot; 1.0 when none was asked for."""
        total = self.hits + self.misses
        return self.hits / total if total else 1.0

    @property
    def page_in_bytes_per_token(self) -> float:
        return self.page_in_bytes / max(self.num_tokens, 1)

    def cost(self, *, dense_parameters: int, expert_parameters: int) -> SkippingCost:
        """What the rule leaves to be computed and read per token; see `skipping_cost`."""
        return skipping_cost(
            self.rule,
            RoutedCounts(
                self.routed_experts, self.skipped_experts, self.routed_bytes, self.skipped_bytes
            ),
            self.num_tokens,
            dense_parameters=dense_parameters,
            expert_parameters=expert_parameters,
        )


@dataclass
class _Slots:
    """The bookkeeping of `ExpertCache`, without bytes and threads."""

    sizes: Sequence[Sequence[int]]
    free: dict[int, int]
    policies: dict[int, EvictionPolicy]
    resident: set[Key]
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    page_in_bytes: int = 0

    def fill(self) -> None:
        """What a session starts from: every expert for which there is a slot, in layer order."""
        for layer, sizes in enumerate(self.sizes):
            for row, size in enumerate(sizes):
                if self.free[size]:
                    self._admit((layer, row), size)

    def ask(self, key: Key) -> None:
        """A step needs `key`."""
        size = self.sizes[key[0]][key[1]]
        if key in self.resident:
            self.hits += 1
        else:
            self.misses += 1
            self.page_in_bytes += size
            if not self.free[size]:
                self._evict(size)
            self._admit(key, size)
        self.policies[size].use(key)

    def _admit(self, key: Key, size: int) -> None:
        self.free[size] -= 1
        self.resident.add(key)
        self.policies[size].admit(key)

    def _evict(self, size: int) -> None:
        victim = self.policies[size].victim(lambda key: True)
        if victim is None:
            raise InputError(f"no slot holds experts of {size} bytes: give more slots")
        self.policies[size].forget(victim)
        self.resident.remove(victim)
        self.free[size] += 1
        self.evictions += 1


def simulate(
    trace: Trace,
    sizes: Sequence[Sequence[int]],
    slots: Mapping[int, int],
    policy: type[EvictionPolicy],
    skip: SkipRule | None = None,
) -> Simulation:
    """Replay `trace` with `slots` per record size.

    `sizes` are the packed bytes of every expert, [L][rows] in the trace's row order. `skip` leaves
    experts out of the trace's choices; a real run would choose differently after that, since every
    skipped expert changes what later layers see, so counts with a rule are an estimate unless the
    trace was recorded under the same rule.

    Raises:
        InputError: no slot at all for a record size.
    """
    state = _Slots(sizes, dict(slots), {size: policy() for size in slots}, set())
    state.fill()
    layer_sizes = [np.array(layer) for layer in sizes]
    routed_bytes = skipped_experts = skipped_bytes = 0
    for layer, rows, is_skipped in _choices(trace, skip):
        row_bytes = layer_sizes[layer][rows]
        routed_bytes += int(row_bytes.sum())
        skipped_experts += int(is_skipped.sum())
        skipped_bytes += int(row_bytes[is_skipped].sum())
        for row in np.unique(rows[~is_skipped]):  # ascending, as the runtime asks for them
            state.ask((layer, int(row)))
    return Simulation(
        rule=skip.name if skip else "none",
        policy=policy.name,
        num_slots=sum(slots.values()),
        slot_bytes=sum(size * count for size, count in slots.items()),
        num_tokens=trace.num_tokens,
        num_steps=len(trace.step_tokens),
        routed_experts=int(trace.rows.size),
        skipped_experts=skipped_experts,
        routed_bytes=routed_bytes,
        skipped_bytes=skipped_bytes,
        hits=state.hits,
        misses=state.misses,
        evictions=state.evictions,
        page_in_bytes=state.page_in_bytes,
    )


def traced_sizes(trace: Trace, store: ExpertStore, model_fingerprint: str) -> list[list[int]]:
    """[L][rows] packed bytes, in `store`, of the experts that the trace's rows stand for.

    Raises:
        InputError: a trace of another model, or of experts that the store does not have.
    """
    if trace.info.model_fingerprint != model_fingerprint:
        raise InputError(
            f"the trace was recorded with another model ({trace.info.model_fingerprint[:12]}, not "
            f"{model_fingerprint[:12]}): give the model that was traced"
        )
    sizes = []
    for layer, (traced, kept) in enumerate(zip(trace.info.kept, store.kept, strict=True)):
        row_of = {expert_id: row for row, expert_id in enumerate(kept)}
        missing = [expert_id for expert_id in traced if expert_id not in row_of]
        if missing:
            raise InputError(
                f"the trace uses expert {missing[0]} of MoE layer {layer}, which this package "
                "dropped: give the model that was traced"
            )
        sizes.append([store.record((layer, row_of[each])).num_bytes for each in traced])
    return sizes


def _choices(
    trace: Trace, skip: SkipRule | None
) -> Iterator[tuple[int, npt.NDArray[np.uint16], Mask]]:
    """(layer, [T, k] chosen rows, [T, k] which are skipped) of every layer of every step."""
    for tokens in trace.steps():
        for layer in range(len(trace.info.kept)):
            rows = trace.rows[tokens, layer]
            is_skipped: Mask = np.zeros(rows.shape, np.bool_)
            if skip is not None:
                is_skipped = skip.skips(
                    layer, trace.weights[tokens, layer], trace.token_norms[tokens, layer]
                )
            yield layer, rows, is_skipped
