"""Oracles that know some tokens, and routers without memory: worked out by hand, and once more."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_moe.runtime.belady import Belady
from edge_moe.runtime.foresight import (
    SEEN_STEPS,
    WorthOfForesight,
    fixed_hits,
    foresight_hits,
    shuffled,
)
from edge_moe.runtime.policies import POLICIES
from edge_moe.runtime.policy import Key, LeastRecentlyUsed
from edge_moe.runtime.replay import Room
from edge_moe.runtime.simulate import Replay
from edge_moe.runtime.trace import Trace, TraceInfo

LRU = LeastRecentlyUsed


def replay_of(tokens: Sequence[Sequence[Sequence[int]]], steps: Sequence[int] = ()) -> Replay:
    """[N][L][k] rows of layers of six experts, one byte each; single tokens unless `steps` say."""
    rows = np.array(tokens, np.uint16)
    num_layers = rows.shape[1]
    info = TraceInfo(
        model_fingerprint="m",
        moe_layer_ids=tuple(range(num_layers)),
        top_k=rows.shape[2],
        kept=(tuple(range(6)),) * num_layers,
    )
    zeros, norms = np.zeros(rows.shape, np.float16), np.zeros(rows.shape[:2], np.float32)
    lengths = np.array(steps or [1] * len(rows), np.uint32)
    return Replay(Trace(info, rows, zeros, norms, lengths), [[1] * 6] * num_layers)


def single(*rows: int) -> Replay:
    """One layer, top-1."""
    return replay_of([[[row]] for row in rows])


TWO = Room.of_slots({1: 2})
"""Rows 0 and 1 of the first layer are there at the start."""


@pytest.mark.parametrize(
    ("rows", "hits"),
    [
        # LRU lets 0 go for 2, then 1 for 0; who knows that 0 is next lets 1 go
        ((0, 1, 2, 0, 1), {0: 2, 1: 3, 2: 3, None: 3}),
        # when 2 comes, 0 is two steps away, and 1 four
        ((0, 1, 2, 2, 0, 0, 1), {0: 4, 1: 4, 2: 5, 4: 5, None: 5}),
        # all are seen, and the farther goes: 1 for 2
        ((0, 1, 2, 0, 2, 0, 1), {0: 4, 1: 5, 4: 5, None: 5}),
    ],
)
def test_horizons_by_hand(rows: Sequence[int], hits: dict[int | None, int]) -> None:
    assert {n: foresight_hits(single(*rows), TWO, LRU, n) for n in hits} == hits


def test_a_step_is_a_round_of_all_layers() -> None:
    """Two layers, three slots, rows 0 to 2 of the first layer are there at the start.

    (0, 3) comes for the oldest, (0, 2), which the next token needs two layers later: one step tells
    of it, so (0, 1) leaves instead.
    """
    replay, room = replay_of([[[1], [0]], [[3], [0]], [[2], [0]]]), Room.of_slots({1: 3})
    assert foresight_hits(replay, room, LRU, 0) == 3  # (0, 1), then (1, 0) twice
    assert foresight_hits(replay, room, LRU, 1) == 4


def naive_hits(replay: Replay, num_slots: int, num_steps: int) -> int:
    """LRU beyond the horizon; every next use looked up anew."""
    asks = replay.asks()
    uses = [(place, (ask.layer, row)) for place, ask in enumerate(asks) for row in ask.rows]
    every = [(layer, row) for layer in range(len(replay.sizes)) for row in range(6)]
    order: list[Key] = every[:num_slots]  # longest ago first
    hits = 0
    for index, (place, key) in enumerate(uses):
        end = place + num_steps * len(replay.sizes) if num_steps else -1
        if key in order:
            hits += 1
            order.remove(key)
        elif len(order) == num_slots:
            seen = [other for at, other in uses[index:] if at <= end]
            unseen = [other for other in order if other not in seen]
            order.remove(unseen[0] if unseen else max(order, key=seen.index))
        order.append(key)
    return hits


pairs = st.lists(
    st.tuples(
        st.lists(st.integers(0, 5), min_size=2, max_size=2, unique=True),
        st.lists(st.integers(0, 5), min_size=2, max_size=2, unique=True),
    ),
    min_size=1,
    max_size=25,
)


@given(pairs, st.integers(1, 9), st.integers(0, 5))
@settings(deadline=None)
def test_horizons_by_a_second_implementation(
    tokens: list[tuple[list[int], list[int]]], num_slots: int, num_steps: int
) -> None:
    replay, room = replay_of(tokens), Room.of_slots({1: num_slots})
    found = foresight_hits(replay, room, LRU, num_steps)
    assert found == naive_hits(replay, num_slots, num_steps)


@given(pairs, st.integers(2, 9), st.sampled_from(sorted(POLICIES)), st.booleans())
@settings(deadline=None)
def test_between_the_policy_and_belady(
    tokens: list[tuple[list[int], list[int]]], num_slots: int, name: str, is_gguf: bool
) -> None:
    replay = replay_of(tokens)
    room = Room.of_bytes(num_slots, replay.sizes) if is_gguf else Room.of_slots({1: num_slots})
    bound = replay.run(room, Belady).hits
    policy = POLICIES[name]
    assert foresight_hits(replay, room, policy, 0) == replay.run(room, policy).hits
    assert foresight_hits(replay, room, policy, None) == bound
    assert foresight_hits(replay, room, policy, len(tokens)) == bound
    assert foresight_hits(replay, room, policy, 2) <= bound


def test_pools_of_different_sizes_see_the_same_future() -> None:
    """The second layer's experts are twice as large, with two slots of their own."""
    replay = replay_of([[[a], [b]] for a, b in ((0, 0), (1, 1), (2, 2), (0, 0), (1, 1))])
    replay = Replay(replay.trace, [[1] * 6, [2] * 6])
    room = Room.of_slots({1: 2, 2: 2})
    found = [foresight_hits(replay, room, LRU, n) for n in (0, 1, None)]
    assert found == [4, 6, 6]  # twice what one layer does alone
    assert fixed_hits(replay, room) == 8


def test_kept_experts_by_hand() -> None:
    replay = single(0, 0, 0, 1, 1, 2)
    assert fixed_hits(replay, TWO) == 5
    mixed = Replay(replay.trace, [[2, 1, 1, 1, 1, 1]])
    # hits per byte 3/2, 2 and 1: all of row 1, and half of row 0
    assert fixed_hits(mixed, Room.of_bytes(2, mixed.sizes)) == 3
    assert fixed_hits(replay, Room.of_slots({1: 6})) == 6


def test_shuffled_layers_keep_their_counts() -> None:
    rows = np.random.default_rng(0).integers(0, 6, (50, 3, 1))
    trace = replay_of(rows.tolist(), [4, *[1] * 40, 6]).trace
    found = shuffled(trace, seed=1)
    alone = slice(4, 44)
    np.testing.assert_array_equal(found.rows[:4], trace.rows[:4])
    np.testing.assert_array_equal(found.rows[44:], trace.rows[44:])
    orders = set()
    for layer in range(3):
        before, after = trace.rows[alone, layer, 0], found.rows[alone, layer, 0]
        assert sorted(before.tolist()) == sorted(after.tolist())
        assert (before != after).any()
    marked = dataclasses.replace(trace, rows=np.zeros_like(trace.rows))
    marked.rows[4, :, 0] = 1
    orders = {int(shuffled(marked, seed=1).rows[:, layer, 0].argmax()) for layer in range(3)}
    assert len(orders) > 1  # one token's choices come apart
    np.testing.assert_array_equal(shuffled(trace, seed=1).rows, found.rows)


def test_without_memory_nothing_causal_beats_the_most_frequent() -> None:
    """Two layers, each choice drawn alone: shares of .4, .25, .15, .1, .06 and .04."""
    drawn = np.random.default_rng(3).choice(6, (4000, 2, 1), p=[0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    replay = replay_of(drawn.tolist())
    for num_slots in (4, 6):
        room = Room.of_slots({1: num_slots})
        kept = fixed_hits(replay, room)
        # three standard deviations of a count of 8000, p = 1/2
        assert all(replay.run(room, each).hits < kept + 135 for each in POLICIES.values())
        assert replay.run(room, Belady).hits > kept + 135


def test_result_says_all_of_it() -> None:
    replay = single(0, 1, 2, 2, 0, 0, 1)
    calls: list[None] = []
    found = WorthOfForesight(replay, LRU).result(TWO, lambda: calls.append(None))
    assert len(calls) == len(SEEN_STEPS) == len(found.seen)
    assert [each.num_steps for each in found.seen] == list(SEEN_STEPS)
    assert [each.hits for each in found.seen] == [4, 4, 5, 5, 5, 5]
    assert found.seen[0].hit_rate == 4 / 7 and found.seen[0].belady_share == 4 / 5
    assert found.forgetful.fixed == 5 / 7
    assert found.forgetful.policy <= found.forgetful.belady
