"""Replaying a trace through the runtime's eviction policies: what is paged, computed, and skipped.

No torch and no weights: keys, sizes and the policy's own classes. Without read-ahead the counts are
those of the runtime on the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from edge_moe.errors import InputError
from edge_moe.measurement import SkippingCost
from edge_moe.runtime.belady import Belady
from edge_moe.runtime.expert_store import ExpertStore
from edge_moe.runtime.policy import EvictionPolicy, RoutedCounts
from edge_moe.runtime.replay import HostResidents, Residents, Room
from edge_moe.runtime.skipping import Mask, SkipRule
from edge_moe.runtime.skipping_cost import skipping_cost
from edge_moe.runtime.trace import Trace
from edge_moe.spec import ModelSpec


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
    storage_bytes: int
    """... of which came from disk, past a tier in RAM."""

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


@dataclass(frozen=True)
class Ask:
    """A step needs experts of a layer."""

    layer: int
    rows: list[int]
    """Each once, ascending: as the engines ask."""
    step_tokens: int
    first_token: int = 0
    """Place in the trace of the step's first token, or of this piece of it."""

    @property
    def is_decoding(self) -> bool:
        """Whether the step is a single token, as when text is generated."""
        return self.step_tokens == 1


class Replay:
    """A trace and a skipping rule, ready to be replayed in any room under any policy."""

    def __init__(
        self, trace: Trace, sizes: Sequence[Sequence[int]], skip: SkipRule | None = None
    ) -> None:
        """`sizes` are the bytes of every expert, [L][rows] in the trace's row order.

        `skip` leaves experts out of the trace's choices; a real run would choose differently after
        that, since every skipped expert changes what later layers see, so counts with a rule are an
        estimate unless the trace was recorded under the same rule.

        Raises:
            InputError: a rule, and a trace without weights.
        """
        if skip is not None and not trace.info.has_weights:
            raise InputError(
                "the trace holds no weights of experts, by which --skip chooses (llama.cpp told "
                "their ids only): record one of a checkpoint or a native package"
            )
        self.trace = trace
        self.sizes = sizes
        self._skip = skip
        self._asks: dict[int | None, list[Ask]] = {}
        self._rule = skip.name if skip else "none"
        layer_sizes = [np.array(layer) for layer in sizes]
        routed_bytes = skipped_experts = skipped_bytes = 0
        for layer, rows, is_skipped, _, _ in _choices(trace, skip, None):
            row_bytes = layer_sizes[layer][rows]
            routed_bytes += int(row_bytes.sum())
            skipped_experts += int(is_skipped.sum())
            skipped_bytes += int(row_bytes[is_skipped].sum())
        self._counts = RoutedCounts(
            int(trace.rows.size), skipped_experts, routed_bytes, skipped_bytes
        )

    def asks(self, most_tokens: int | None = None) -> list[Ask]:
        """What is asked for, in order; steps of more than `most_tokens` are cut."""
        if most_tokens not in self._asks:
            self._asks[most_tokens] = [
                Ask(layer, sorted(set(rows[~is_skipped].tolist())), step_tokens, start)
                for layer, rows, is_skipped, step_tokens, start in _choices(
                    self.trace, self._skip, most_tokens
                )
            ]
        return self._asks[most_tokens]

    def token_id(self, ask: Ask) -> int | None:
        """Of a step of one token; None where the trace does not say."""
        ids = self.trace.token_ids
        return None if ids is None else int(ids[ask.first_token])

    def residents(self, room: Room, policy: type[EvictionPolicy]) -> Residents:
        """What the replay starts from; Belady's rule is told what comes.

        Raises:
            InputError: no slot at all for a size.
        """
        if issubclass(policy, Belady):
            future = [(ask.layer, row) for ask in self.asks(room.most_tokens) for row in ask.rows]
            return Residents(self.sizes, room, lambda: policy(future))
        return Residents(self.sizes, room, policy)

    def run(
        self, room: Room, policy: type[EvictionPolicy], host_bytes: int | None = None
    ) -> Simulation:
        """Count what is paged, through `host_bytes` of RAM where there is a tier between.

        Raises:
            InputError: no slot at all for a size, or too few for one step.
        """
        residents = self.residents(room, policy)
        host = HostResidents(host_bytes or 0)
        if room.is_filled:
            host.fill(residents)
        asked = misses = page_in_bytes = storage_bytes = 0
        for ask in self.asks(room.most_tokens):
            missed = residents.ask(ask.layer, ask.rows)
            asked += len(ask.rows)
            misses += len(missed)
            for key in missed:
                size = residents.num_bytes(key)
                page_in_bytes += size
                storage_bytes += 0 if host.fetch(key, size) else size
        return Simulation(
            rule=self._rule,
            policy=policy.name,
            num_slots=room.num_slots,
            slot_bytes=room.num_bytes,
            num_tokens=self.trace.num_tokens,
            num_steps=len(self.trace.step_tokens),
            routed_experts=self._counts.routed_experts,
            skipped_experts=self._counts.skipped_experts,
            routed_bytes=self._counts.routed_bytes,
            skipped_bytes=self._counts.skipped_bytes,
            hits=asked - misses,
            misses=misses,
            evictions=residents.evictions,
            page_in_bytes=page_in_bytes,
            storage_bytes=storage_bytes,
        )


def simulate(
    trace: Trace,
    sizes: Sequence[Sequence[int]],
    room: Room,
    policy: type[EvictionPolicy],
    skip: SkipRule | None = None,
) -> Simulation:
    """One replay; see `Replay`."""
    return Replay(trace, sizes, skip).run(room, policy)


def with_uniform_router(trace: Trace, seed: int = 0) -> Trace:
    """`trace` with each token's experts drawn uniformly: what its locality is worth is the rest.

    Weights and norms stay; steps, layers and top_k do, too.
    """
    generator = np.random.default_rng(seed)
    rows = np.empty_like(trace.rows)
    for layer, kept in enumerate(trace.info.kept):
        order = generator.random((trace.num_tokens, len(kept))).argsort(axis=1)
        rows[:, layer] = order[:, : trace.info.top_k]
    return replace(trace, rows=rows, guesses={})


def traced_sizes(trace: Trace, store: ExpertStore, model_fingerprint: str) -> list[list[int]]:
    """[L][rows] packed bytes, in `store`, of the experts that the trace's rows stand for.

    Raises:
        InputError: a trace of another model, or of experts that the store does not have.
    """
    require_same_model(trace, model_fingerprint)
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


def require_same_model(trace: Trace, model_fingerprint: str) -> None:
    """Raise InputError unless `trace` was recorded with the model of this fingerprint."""
    if trace.info.model_fingerprint != model_fingerprint:
        raise InputError(
            f"the trace was recorded with another model ({trace.info.model_fingerprint[:12]}, not "
            f"{model_fingerprint[:12]}): give the model that was traced"
        )


def require_spec(trace: Trace, spec: ModelSpec) -> None:
    """Raise InputError where a trace that names the model contradicts it."""
    info = trace.info
    found, expected = (info.moe_layer_ids, info.top_k), (spec.moe_layer_ids, spec.top_k)
    what = f"MoE layers {list(found[0])} and top_k={found[1]}" if found != expected else ""
    highest = 0 if trace.token_ids is None else int(trace.token_ids.max(initial=0))
    if highest >= spec.vocab_size:
        what = f"token {highest} of {spec.vocab_size}"
    if what:
        raise InputError(f"the trace has {what}, unlike the model it names: record it again")


def _choices(
    trace: Trace, skip: SkipRule | None, most_tokens: int | None
) -> Iterator[tuple[int, npt.NDArray[np.uint16], Mask, int, int]]:
    """(layer, [T, k] chosen rows, [T, k] which are skipped, the step's tokens, place of the first)

    In order. T are the tokens of a step, or of a piece of it: every layer of a piece comes before
    the next.
    """
    for step in trace.steps():
        step_tokens = step.stop - step.start
        for start in range(step.start, step.stop, most_tokens or step_tokens):
            tokens = slice(start, min(start + (most_tokens or step_tokens), step.stop))
            for layer in range(len(trace.info.kept)):
                rows = trace.rows[tokens, layer]
                is_skipped: Mask = np.zeros(rows.shape, np.bool_)
                if skip is not None:
                    is_skipped = skip.skips(
                        layer, trace.weights[tokens, layer], trace.token_norms[tokens, layer]
                    )
                yield layer, rows, is_skipped, step_tokens, start
