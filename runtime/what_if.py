"""`what_if`: one trace under many orders of eviction and sizes of memory, as records to print."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from edge_moe.errors import BudgetError
from edge_moe.plan import MemoryTerm
from edge_moe.profile import DeviceProfile
from edge_moe.runtime.belady import Belady
from edge_moe.runtime.foresight import ForesightResult, WorthOfForesight
from edge_moe.runtime.known_predictors import Maker, lacking, predictor_makers
from edge_moe.runtime.limit import Limit, limit
from edge_moe.runtime.policy import EvictionPolicy
from edge_moe.runtime.replay import Room
from edge_moe.runtime.score_predictors import PredictorScore, score_predictor
from edge_moe.runtime.simulate import Replay, Simulation, with_uniform_router
from edge_moe.runtime.timeline import Timeline, timeline
from edge_moe.runtime.trace import Trace
from edge_moe.runtime.traced_model import TracedModel, term_bytes

SPLIT_LOSS = 0.05
"""The best split gives the KV cache as much as costs less than this share of the speed."""
_SHORTEST_CONTEXT = 256


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PolicyResult(_Model):
    """One order of eviction."""

    policy: str
    hits: int
    misses: int
    hit_rate: float
    belady_share: float
    """Of the hits of Belady's rule."""
    evictions: int
    page_in_bytes: int
    page_in_bytes_per_token: float
    storage_bytes: int
    """Of what was paged in: from disk."""
    uniform_hit_rate: float
    """With every token's experts drawn uniformly."""


class Split(_Model):
    """A budget divided for one length of context."""

    context_tokens: int
    kv_bytes: int
    num_slots: int
    hit_rate: float
    page_in_bytes_per_token: float
    tokens_per_second: float | None
    """By the serial limit; None without a device profile."""


class SizeResult(_Model):
    """One size of memory for experts. Bytes are those in memory."""

    budget_bytes: int | None
    context_tokens: int
    num_slots: int
    slot_bytes: int
    share_of_experts: float
    """Of all experts' bytes."""
    cycle_bytes: int
    is_below_cycle: bool
    policies: tuple[PolicyResult, ...]
    foresight: ForesightResult | None
    """Beside the first policy, as what follows; None where it was not asked for."""
    limit: Limit | None
    predictors: tuple[PredictorScore, ...]
    not_scored: tuple[str, ...]
    """Predictors that the trace cannot feed, and why."""
    timelines: tuple[Timeline, ...]
    splits: tuple[Split, ...]
    best_context_tokens: int | None


@dataclass(frozen=True)
class Question:
    """What is asked of a trace."""

    trace: Trace
    model: TracedModel
    policies: Sequence[type[EvictionPolicy]]
    context_tokens: int
    device: DeviceProfile | None
    sync_seconds: float
    storage_rate: int | None
    """Bytes per second; None takes the profile's."""
    host_bytes: int | None
    """RAM between the disk and a GPU for experts."""
    has_predictors: bool
    has_budget: bool
    seed: int = 0
    is_here: bool = False
    """`device` is the machine at hand."""
    compute_seconds: float | None = None
    """Of a token that finds every expert, measured."""
    has_foresight: bool = False


class WhatIf:
    """Answers a `Question` for one size of memory after another."""

    def __init__(self, question: Question) -> None:
        """Raise InputError where the trace is not one of the model."""
        self._ask = question
        self._sizes = question.model.sizes(question.trace)
        self._bills: dict[int, list[MemoryTerm]] = {}
        self.replay = Replay(question.trace, self._sizes)
        self._uniform = Replay(with_uniform_router(question.trace, question.seed), self._sizes)
        self._foresight = (
            WorthOfForesight(self.replay, question.policies[0], question.seed)
            if question.has_foresight
            else None
        )

    def size(
        self,
        budget_bytes: int | None,
        num_slots: int | None,
        advance: Callable[[], None] = lambda: None,
    ) -> SizeResult:
        """Everything about one size; `advance` is called after each replay of a policy or oracle.

        Raises:
            BudgetError: too small even when paging.
            InputError: too few slots.
        """
        ask, sizes = self._ask, self._sizes
        room = self.room(budget_bytes, num_slots)
        cycle, every = ask.model.cycle_bytes(sizes), sum(map(sum, sizes))
        found = list(self._replayed(room, advance))
        first = found[0][0]
        term = self._limit(first, ask.context_tokens)
        splits = self._splits(budget_bytes) if budget_bytes is not None else ()
        return SizeResult(
            budget_bytes=budget_bytes,
            context_tokens=ask.context_tokens,
            num_slots=room.num_slots,
            slot_bytes=room.num_bytes,
            share_of_experts=min(1.0, room.num_bytes / every),
            cycle_bytes=cycle,
            is_below_cycle=room.num_bytes < min(cycle, every),
            policies=tuple(_policy_results(found)),
            foresight=self._foresight.result(room, advance) if self._foresight else None,
            limit=term,
            predictors=tuple(self._scores(room)),
            not_scored=tuple(lacking(ask.trace, ask.model.never_guessed))
            if ask.has_predictors
            else (),
            timelines=tuple(self._timelines(room, first, term)),
            splits=splits,
            best_context_tokens=_best_context(splits),
        )

    def room(self, budget_bytes: int | None, num_slots: int | None) -> Room:
        """Memory for experts with this question's context."""
        return self._room(self._ask.context_tokens, budget_bytes, num_slots)

    def _room(self, context: int, budget_bytes: int | None, num_slots: int | None) -> Room:
        model = self._ask.model
        terms = self._terms(context)
        return model.room(self._sizes, terms, budget_bytes, num_slots)

    def _terms(self, context: int) -> list[MemoryTerm]:
        """The bill; a process is measured where the machine at hand is meant."""
        if context not in self._bills:
            ask = self._ask
            is_here = (ask.device is None or ask.is_here) and ask.has_budget
            self._bills[context] = ask.model.terms(context, has_budget=is_here)
        return self._bills[context]

    def _replayed(
        self, room: Room, advance: Callable[[], None]
    ) -> Iterator[tuple[Simulation, Simulation]]:
        """(the trace, a uniform router) of every policy, Belady's rule last."""
        policies: list[type[EvictionPolicy]] = [*self._ask.policies, Belady]
        for policy in policies:
            host = self._ask.host_bytes
            yield self.replay.run(room, policy, host), self._uniform.run(room, policy)
            advance()

    def _limit(self, result: Simulation, context: int) -> Limit | None:
        ask = self._ask
        if ask.device is None:
            return None
        terms = self._terms(context)
        return limit(
            result,
            ask.device,
            dense_bytes=ask.model.dense_read_bytes(terms),
            kv_bytes=term_bytes(terms, "KV cache"),
            num_layers=len(self._sizes),
            sync_seconds=ask.sync_seconds,
            storage_rate=ask.storage_rate,
            has_host=ask.host_bytes is not None,
            compute_seconds=ask.compute_seconds,
        )

    def _splits(self, budget_bytes: int) -> tuple[Split, ...]:
        """Every length of context that the budget allows, doubling up to the model's limit."""
        longest = self._ask.model.spec.max_position_embeddings
        context, found = min(_SHORTEST_CONTEXT, longest), []
        while context <= longest:
            try:
                room = self._room(context, budget_bytes, None)
            except BudgetError:
                break
            found.append(self._split(context, room))
            context *= 2
        return tuple(found)

    def _split(self, context: int, room: Room) -> Split:
        result = self.replay.run(room, self._ask.policies[0], self._ask.host_bytes)
        term = self._limit(result, context)
        terms = self._terms(context)
        return Split(
            context_tokens=context,
            kv_bytes=term_bytes(terms, "KV cache"),
            num_slots=room.num_slots,
            hit_rate=result.hit_rate,
            page_in_bytes_per_token=result.page_in_bytes_per_token,
            tokens_per_second=term.serial_tokens_per_second if term else None,
        )

    def _makers(self) -> list[Maker]:
        if not self._ask.has_predictors:
            return []
        return predictor_makers(self.replay, self._ask.model.spec.top_k)

    def _scores(self, room: Room) -> Iterator[PredictorScore]:
        for make in self._makers():
            yield score_predictor(self.replay, room, self._ask.policies[0], make())

    def _timelines(self, room: Room, first: Simulation, term: Limit | None) -> Iterator[Timeline]:
        """Nothing read ahead, then each predictor, where a device says how fast its link is."""
        device, makers = self._ask.device, self._makers()
        paged = first.page_in_bytes_per_token
        if device is None or term is None or not makers or not paged:
            return
        computing = term.compute_seconds
        if term.measured_compute_seconds is None:
            # what was paged in is read from the device's memory, too
            computing += paged / device.memory_bytes_per_second
        layer_seconds = (computing + term.sync_seconds) / len(self._sizes)
        for predictor in (None, *(make() for make in makers)):
            yield timeline(
                self.replay,
                room,
                self._ask.policies[0],
                predictor,
                bytes_per_second=paged / term.page_in_seconds,
                layer_seconds=layer_seconds,
            )


def _policy_results(found: Sequence[tuple[Simulation, Simulation]]) -> Iterator[PolicyResult]:
    bound = found[-1][0].hits
    for result, uniform in found:
        yield PolicyResult(
            policy=result.policy,
            hits=result.hits,
            misses=result.misses,
            hit_rate=result.hit_rate,
            belady_share=result.hits / bound if bound else 1.0,
            evictions=result.evictions,
            page_in_bytes=result.page_in_bytes,
            page_in_bytes_per_token=result.page_in_bytes_per_token,
            storage_bytes=result.storage_bytes,
            uniform_hit_rate=uniform.hit_rate,
        )


def _best_context(splits: Sequence[Split]) -> int | None:
    """The longest context that costs less than `SPLIT_LOSS` of the shortest one's speed.

    Without a device, bytes that are paged in stand for time.
    """
    if not splits:
        return None
    least = splits[0]

    def is_near(split: Split) -> bool:
        if split.tokens_per_second is not None and least.tokens_per_second is not None:
            return split.tokens_per_second >= (1 - SPLIT_LOSS) * least.tokens_per_second
        paged, fewest = split.page_in_bytes_per_token, least.page_in_bytes_per_token
        return paged * (1 - SPLIT_LOSS) <= fewest

    return max(split.context_tokens for split in splits if is_near(split))
