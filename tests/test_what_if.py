"""Predictors, the clock, the limit formula and `simulate` as a whole, worked out by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import TinyCheckpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_moe.checkpoint import Checkpoint
from edge_moe.cli import run
from edge_moe.errors import InputError
from edge_moe.profile import DeviceProfile
from edge_moe.profiles import device_names, load_device
from edge_moe.runtime.belady import Belady
from edge_moe.runtime.known_predictors import lacking, predictor_makers
from edge_moe.runtime.limit import limit
from edge_moe.runtime.policies import POLICIES
from edge_moe.runtime.policy import LeastRecentlyUsed
from edge_moe.runtime.predictors import (
    Popular,
    Predictor,
    Repeat,
    Replayed,
    TokenPrior,
    Transitions,
)
from edge_moe.runtime.replay import Room
from edge_moe.runtime.score_predictors import LayerScore, score_predictor
from edge_moe.runtime.simulate import Replay, simulate, with_uniform_router
from edge_moe.runtime.timeline import timeline
from edge_moe.runtime.trace import NO_GUESS, Trace, TraceInfo
from edge_moe.runtime.what_if import Split, _best_context

MB = 10**6


def trace_of(rows: Sequence[Sequence[Sequence[int]]], num_rows: int, steps: list[int]) -> Trace:
    """[N][L][k] rows of layers with `num_rows` experts each."""
    table = np.array(rows, np.uint16)
    num_layers = table.shape[1]
    info = TraceInfo(
        model_fingerprint="m",
        moe_layer_ids=tuple(range(num_layers)),
        top_k=table.shape[2],
        kept=(tuple(range(num_rows)),) * num_layers,
    )
    zeros = np.zeros(table.shape, np.float16)
    norms = np.zeros(table.shape[:2], np.float32)
    return Trace(info, table, zeros, norms, np.array(steps, np.uint32))


def decoding(*rows: Sequence[Sequence[int]], num_rows: int = 4) -> Replay:
    """One token a step; experts of 1 MB."""
    trace = trace_of(rows, num_rows, [1] * len(rows))
    return Replay(trace, [[MB] * num_rows] * len(rows[0]))


def exact(replay: Replay) -> Replayed:
    return Replayed("exact", [(ask.layer, ask.rows) for ask in replay.asks() if ask.is_decoding])


# ---------------------------------------------------------------------- guesses


def test_predictors_by_hand() -> None:
    counts = [3, 3]
    popular, repeat, follows = Popular(counts, 1), Repeat(counts), Transitions(counts, 2)
    every: list[Predictor] = [popular, repeat, follows]
    for predictor in every:
        assert predictor.guess(0, [0]) == []  # nothing was seen
    for first, second in ((0, 1), (0, 1), (0, 2), (1, 2), (1, 2)):
        for predictor in every:
            predictor.learn(0, [first])
            predictor.learn(1, [second])
    assert popular.guess(0, [0]) == [2]  # 3 of 5
    assert repeat.guess(0, [0]) == [2]
    assert follows.guess(0, [0]) == [1, 2]  # 2/3 and 1/3
    assert follows.guess(0, [1]) == [2]
    assert follows.guess(0, [0, 1]) == [2, 1]  # 4/3 and 2/3
    assert follows.guess(0, [2]) == []


def test_token_prior_by_hand() -> None:
    """Two layers; token 7 goes to 1 and 2 in the second, then twice to 3 and 2."""
    prior = TokenPrior(2, 2)

    def goes(token_id: int, rows: list[int]) -> None:
        prior.begin(token_id)
        prior.learn(0, [0])
        prior.learn(1, rows)

    goes(7, [1, 2])
    goes(8, [0])
    prior.begin(7)
    assert prior.guess(0, [0]) == [1, 2]
    goes(7, [2, 3])  # 3 takes the place of 1, and its count: 2 of each
    assert prior.guess(0, [0]) == [3, 2]
    goes(7, [2, 3])
    prior.begin(8)
    assert prior.guess(0, [0]) == [0]
    prior.begin(9)
    assert prior.guess(0, [0]) == []
    prior.begin(None)
    prior.learn(1, [1])
    assert prior.guess(0, [0]) == []


@given(st.lists(st.integers(0, 50), min_size=1, max_size=200), st.integers(1, 6))
def test_token_prior_forgets_and_stays_small(tokens: list[int], most: int) -> None:
    prior = TokenPrior(2, 2, limit_bytes=most * 2 * 2 * 8)
    last: list[int] = []
    for token_id in tokens:
        prior.begin(token_id)
        assert (prior.guess(0, []) == [token_id % 4]) == (token_id in last)
        prior.learn(0, [0])
        prior.learn(1, [token_id % 4])
        last = [*(each for each in last if each != token_id), token_id][-most:]
        assert prior.num_bytes == len(last) * 2 * 2 * 8 <= most * 2 * 2 * 8


def test_token_prior_is_exact_where_a_table_routes() -> None:
    """Hash layers (Roller et al. 2021): rows follow from the token id and the layer alone."""
    random = np.random.default_rng(0)
    table = np.sort(random.random((20, 3, 8)).argsort(axis=2)[:, :, :2], axis=2)
    tokens = np.concatenate([np.arange(20), random.integers(0, 20, 200)]).astype(np.uint32)
    trace = dataclasses.replace(
        trace_of(table[tokens].tolist(), 8, [1] * len(tokens)), token_ids=tokens
    )
    replay = Replay(trace, [[MB] * 8] * 3)
    room = Room.of_slots({MB: 8})
    score = score_predictor(replay, room, LeastRecentlyUsed, TokenPrior(3, 2))
    first = score_predictor(
        Replay(
            dataclasses.replace(trace, rows=trace.rows[:20], step_tokens=trace.step_tokens[:20]),
            [[MB] * 8] * 3,
        ),
        room,
        LeastRecentlyUsed,
        TokenPrior(3, 2),
    )
    assert score.layers[1].precision == score.layers[2].precision == 1
    for layer in (1, 2):  # what was missed, but when a token was seen first, was guessed
        assert first.layers[layer].guessed == 0
        missed = score.layers[layer].missed - first.layers[layer].missed
        assert score.layers[layer].right == missed > 0


def test_what_a_trace_lacks_is_said() -> None:
    old = decoding([[0], [3]], [[1], [2]])
    assert lacking(old.trace, {"linear": "it cannot be"})[1:] == [
        lacking(old.trace)[1],
        "linear map: it cannot be",
    ]
    assert [line.partition(":")[0] for line in lacking(old.trace)] == [
        "token prior",
        "next router",
        "linear map",
    ]
    assert [make().name for make in predictor_makers(old, 1)] == [
        *("last token's", "popular 1", "popular 2", "transitions 1", "transitions 2", "exact")
    ]
    guesses = np.array([[[NO_GUESS] * 2, [3, 1]], [[NO_GUESS] * 2, [0, 2]]], np.uint16)
    trace = dataclasses.replace(
        old.trace, token_ids=np.array([5, 6], np.uint32), guesses={"router": guesses}
    )
    replay = Replay(trace, old.sizes)
    assert [line.partition(":")[0] for line in lacking(trace)] == ["linear map"]
    found = {make().name: make for make in predictor_makers(replay, 1)}
    room = Room.of_slots({MB: 1})
    scores = [
        score_predictor(replay, room, LeastRecentlyUsed, found[name]()).layers[1]
        for name in ("next router 1", "next router 2", "token prior 2")
    ]
    assert scores[0] == LayerScore(missed=2, guessed=2, right=1)
    assert scores[1] == LayerScore(missed=2, guessed=4, right=2)
    assert scores[2] == LayerScore(missed=2, guessed=0, right=0)


def test_guesses_are_scored_on_misses() -> None:
    """Two layers, two slots: (0, 0) and (0, 1) are there; each token needs row 0, then row 3."""
    replay = decoding([[0], [3]], [[0], [3]], [[0], [2]])
    room = Room.of_slots({MB: 2})
    score = score_predictor(replay, room, LeastRecentlyUsed, Repeat([4, 4]))
    # (1, 3) misses unguessed, then stays; in the end 3 is guessed, but it is there: no guess
    assert score.layers[1] == LayerScore(missed=2, guessed=0, right=0)
    assert score.layers[0].missed == 0 and score.total.recall == 0 and score.total.precision == 1
    narrow = Room.of_slots({MB: 1})
    score = score_predictor(replay, narrow, LeastRecentlyUsed, Repeat([4, 4]))
    # one slot: all six miss but the first; guesses are 3 (right) and 3 (wrong)
    assert score.layers[1] == LayerScore(missed=3, guessed=2, right=1)
    assert score.total == LayerScore(missed=5, guessed=2, right=1)
    found = score_predictor(replay, narrow, LeastRecentlyUsed, exact(replay))
    assert found.layers[1].recall == found.layers[1].precision == 1


# ---------------------------------------------------------------------- the clock


def test_clock_by_hand() -> None:
    """A slot for one of two layers; experts load in 1 s, a layer computes for 2 s."""
    replay = decoding([[0], [0]], [[0], [0]])
    slots, rates = Room.of_slots({MB: 1}), {"bytes_per_second": 1e6, "layer_seconds": 2.0}
    plain = timeline(replay, slots, LeastRecentlyUsed, None, **rates)
    # (0, 0) is there; three loads of 1 s, four computations of 2 s
    assert (plain.seconds, plain.stall_seconds, plain.page_in_bytes) == (11, 3, 3 * MB)
    assert plain.tokens_per_second == 2 / 11
    # its only slot is in use while it could be read ahead
    ahead = timeline(replay, slots, LeastRecentlyUsed, exact(replay), **rates)
    assert (ahead.seconds, ahead.useful_bytes) == (11, 0)


def test_clock_hides_loads_behind_compute() -> None:
    """Two slots of two layers that change their expert with every token."""
    rows = [[[0], [0]], [[1], [1]], [[2], [2]], [[3], [3]]]
    replay = decoding(*rows)
    slots = Room.of_slots({MB: 2})
    slow = {"bytes_per_second": 1e6, "layer_seconds": 2.0}
    plain = timeline(replay, slots, LeastRecentlyUsed, None, **slow)
    # the first of (0, 0) is a hit: seven loads of 1 s, eight computations of 2 s
    assert plain.seconds == 7 + 16
    ahead = timeline(replay, slots, LeastRecentlyUsed, exact(replay), **slow)
    # every second layer is read while the first computes
    assert ahead.seconds == 3 + 16
    assert (ahead.useful_bytes, ahead.late_bytes, ahead.wasted_bytes) == (4 * MB, 0, 0)
    assert [layer.useful_bytes for layer in ahead.layers] == [0, 4 * MB]
    quick = {"bytes_per_second": 1e6, "layer_seconds": 0.25}
    late = timeline(replay, slots, LeastRecentlyUsed, exact(replay), **quick)
    assert (late.useful_bytes, late.late_bytes) == (0, 4 * MB)
    assert late.seconds == 3 + 4 * 0.75 + 8 * 0.25  # a quarter of each is hidden


def test_clock_of_gguf_reads_what_fits_before_the_next_choice() -> None:
    """Two layers of four experts of 3 MB that change with every token, room for three."""
    size = 3 * MB
    rows = [[[0], [0]], [[1], [1]], [[2], [2]], [[3], [3]]]
    replay = Replay(trace_of(rows, 4, [1] * 4), [[size] * 4] * 2)
    room = Room.of_bytes(3 * size, replay.sizes)
    for layer_seconds, read_bytes in ((3.0, size), (2.5, 2 * MB), (1.0, MB), (0.9, 0)):
        rates = {"bytes_per_second": 1e6, "layer_seconds": layer_seconds}
        plain = timeline(replay, room, LeastRecentlyUsed, None, **rates)
        assert plain.seconds == pytest.approx(8 * 3 + 8 * layer_seconds)
        found = timeline(replay, room, LeastRecentlyUsed, exact(replay), **rates)
        assert found.useful_bytes == 4 * read_bytes and found.page_in_bytes == 8 * size
        assert (found.late_bytes, found.wasted_bytes) == (0, 0)
        assert found.seconds == pytest.approx(plain.seconds - 4 * read_bytes / 1e6)
        assert found.rejected == (0 if read_bytes else 4)


def test_a_part_that_was_read_for_nothing_makes_room_at_once() -> None:
    rows = [[[0], [0]], [[1], [1]], [[2], [1]]]
    replay = Replay(trace_of(rows, 4, [1] * 3), [[3 * MB] * 4] * 2)
    room = Room.of_bytes(3 * 3 * MB, replay.sizes)
    rates = {"bytes_per_second": 1e6, "layer_seconds": 1.0}
    plain = timeline(replay, room, LeastRecentlyUsed, None, **rates)
    found = timeline(replay, room, LeastRecentlyUsed, Repeat([4, 4]), **rates)
    # for the second token (1, 0) is there; for the third a MB of none: (1, 1) is; all others demand
    assert plain.seconds == found.seconds == 5 * 3 + 6
    assert found.wasted_bytes == 0 and found.page_in_bytes == plain.page_in_bytes

    class Wrong(Repeat):
        def guess(self, layer: int, rows: Sequence[int] = ()) -> list[int]:
            return [3]

    found = timeline(replay, room, LeastRecentlyUsed, Wrong([4, 4]), **rates)
    assert (found.wasted_bytes, found.seconds) == (3 * MB, plain.seconds)
    assert found.page_in_bytes == plain.page_in_bytes + 3 * MB


def test_prompts_take_no_time_and_wrong_guesses_are_wasted() -> None:
    trace = trace_of([[[0], [1]], [[1], [0]], [[2], [3]], [[2], [2]]], 4, [2, 1, 1])
    replay = Replay(trace, [[MB] * 4] * 2)
    rates = {"bytes_per_second": 1e6, "layer_seconds": 2.0}
    found = timeline(replay, Room.of_slots({MB: 3}), LeastRecentlyUsed, Repeat([4, 4]), **rates)
    assert found.num_tokens == 2
    # (0, 2) and (1, 3) are demanded, the second token finds both; (1, 2) is not what was guessed
    assert found.seconds == 3 + 8
    assert found.page_in_bytes == 3 * MB


@given(st.lists(st.integers(0, 3), min_size=8, max_size=40), st.floats(0.1, 8), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_clock_adds_up(flat: list[int], layer_seconds: float, num_slots: int) -> None:
    pairs = [[[a], [b]] for a, b in zip(flat[::2], flat[1::2], strict=False)]
    replay, room = decoding(*pairs), Room.of_slots({MB: num_slots})
    rates = {"bytes_per_second": 1e6, "layer_seconds": layer_seconds}
    counted = replay.run(room, LeastRecentlyUsed)
    plain = timeline(replay, room, LeastRecentlyUsed, None, **rates)
    assert plain.page_in_bytes == counted.page_in_bytes
    assert plain.seconds == pytest.approx(2 * len(pairs) * layer_seconds + counted.misses)
    for predictor in (Repeat([4, 4]), Transitions([4, 4], 2), exact(replay)):
        found = timeline(replay, room, LeastRecentlyUsed, predictor, **rates)
        assert found.wasted_bytes >= 0
        assert found.seconds == pytest.approx(2 * len(pairs) * layer_seconds + found.stall_seconds)
        if predictor.name == "exact" and num_slots > 1:
            assert found.wasted_bytes == 0


# ---------------------------------------------------------------------- limit, null and split


def test_limit_formula_by_hand() -> None:
    """One token, two layers of one 1 MB expert, one of which was paged in."""
    result = decoding([[0], [0]]).run(Room.of_slots({MB: 1}), LeastRecentlyUsed)
    assert (result.hits, result.misses, result.storage_bytes) == (1, 1, MB)
    gpu = DeviceProfile("d", "cuda", 10**9, 10 * MB, 2 * MB, None, {})
    sized = partial(limit, result, dense_bytes=4 * MB, kv_bytes=MB, num_layers=2, sync_seconds=0.05)
    terms = sized(gpu)
    assert (terms.dense_seconds, terms.kv_seconds, terms.resident_seconds) == (0.4, 0.1, 0.1)
    assert (terms.link_seconds, terms.storage_seconds, terms.sync_seconds) == (0.5, 0, 0.1)
    assert terms.serial_tokens_per_second == pytest.approx(1 / 1.2)
    assert terms.overlapped_tokens_per_second == pytest.approx(1 / 0.7)
    terms = sized(gpu, storage_rate=MB, has_host=True)
    assert (terms.link_seconds, terms.storage_seconds) == (0.5, 1.0)
    assert terms.serial_tokens_per_second == pytest.approx(1 / 2.2)
    assert terms.overlapped_tokens_per_second == pytest.approx(1 / 1.1)
    with pytest.raises(InputError, match="how fast the disk beside d is: add --storage-rate"):
        sized(gpu, has_host=True)
    cpu = DeviceProfile("c", "cpu", 10**9, 10 * MB, None, 4 * MB, {})
    terms = sized(cpu)
    assert (terms.link_seconds, terms.storage_seconds) == (0, 0.25)


def test_steps_are_cut_where_their_experts_do_not_fit_together() -> None:
    """Three tokens at once, two layers; room for two experts."""
    trace = trace_of([[[0], [0]], [[1], [1]], [[2], [2]]], 4, [3])
    replay, sizes = Replay(trace, [[MB] * 4] * 2), [[MB] * 4] * 2
    with pytest.raises(InputError, match=r"no room for 3 experts together \(3000000 bytes"):
        replay.run(Room.of_bytes(2 * MB, sizes), LeastRecentlyUsed)
    room = Room.of_bytes(2 * MB, sizes, 2)
    assert [(ask.layer, ask.rows) for ask in replay.asks(2)] == [
        (0, [0, 1]),
        (1, [0, 1]),
        (0, [2]),
        (1, [2]),
    ]
    assert not any(ask.is_decoding for ask in replay.asks(2))
    assert replay.run(room, LeastRecentlyUsed).misses == 6


def test_a_tier_in_ram_spares_the_disk() -> None:
    """One slot on the device; rows 0 1 2 0 1 2 of a single layer, the slot begins with row 0."""
    replay = decoding(*([[row]] for row in (0, 1, 2, 0, 1, 2)))
    room = Room.of_slots({MB: 1})
    assert replay.run(room, LeastRecentlyUsed).storage_bytes == 5 * MB
    # it starts with those that have no slot, and whoever came through stays: row 0 is read once
    assert replay.run(room, LeastRecentlyUsed, 3 * MB).storage_bytes == MB
    # two places for a round of three: after the start LRU has never what comes next
    assert replay.run(room, LeastRecentlyUsed, 2 * MB).storage_bytes == 3 * MB
    assert replay.run(room, LeastRecentlyUsed, MB - 1).storage_bytes == 5 * MB


def test_uniform_router_keeps_everything_but_the_choice() -> None:
    trace = trace_of([[[0, 1]] * 2] * 3000, 8, [1] * 3000)
    uniform = with_uniform_router(trace, seed=1)
    assert uniform.rows.shape == trace.rows.shape and uniform.info == trace.info
    counts = np.bincount(uniform.rows[:, 1].ravel(), minlength=8)
    assert (abs(counts - 750) < 5 * np.sqrt(750)).all()
    ordered = np.sort(uniform.rows, axis=2)
    assert (ordered[:, :, 0] < ordered[:, :, 1]).all()
    np.testing.assert_array_equal(with_uniform_router(trace, seed=1).rows, uniform.rows)
    assert (with_uniform_router(trace, seed=2).rows != uniform.rows).any()
    # 8 of 16 slots: whatever the order, half of uniform choices hit
    result = simulate(uniform, [[1] * 8] * 2, Room.of_slots({1: 8}), POLICIES["lru"])
    assert result.hit_rate == pytest.approx(0.5, abs=0.05)


def test_best_split_is_the_longest_context_that_costs_little() -> None:
    def split(context: int, paged: float, speed: float | None) -> Split:
        return Split(
            context_tokens=context,
            kv_bytes=1,
            num_slots=1,
            hit_rate=0.5,
            page_in_bytes_per_token=paged,
            tokens_per_second=speed,
        )

    assert _best_context([]) is None
    assert _best_context([split(1, 100, None), split(2, 105, None), split(4, 106, None)]) == 2
    assert _best_context([split(1, 1, 20.0), split(2, 9, 19.0), split(4, 1, 18.9)]) == 2


@given(st.lists(st.integers(0, 5), min_size=4, max_size=60), st.integers(1, 8))
@settings(deadline=None)
def test_nobody_beats_belady(flat: list[int], num_slots: int) -> None:
    pairs = [[[a], [b]] for a, b in zip(flat[::2], flat[1::2], strict=False)]
    replay, room = decoding(*pairs, num_rows=6), Room.of_slots({MB: num_slots})
    bound = replay.run(room, Belady).hits
    assert all(replay.run(room, policy).hits <= bound for policy in POLICIES.values())


# ---------------------------------------------------------------------- the command


@pytest.fixture
def traced(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> tuple[Path, Path]:
    """(trace, model)"""
    folder, text = tiny_checkpoint("olmoe"), tmp_path / "text.txt"
    text.write_text("\n".join(f"line {n} of a text" for n in range(60)))
    output = tmp_path / "t.safetensors"
    shape = ["--window-tokens", "40", "--prompt-tokens", "8", "--max-windows", "3"]
    assert run(["trace", str(folder), "--task", str(text), "-o", str(output), *shape]) == 0
    return output, folder


def test_command_line(traced: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    spec = Checkpoint(traced[1]).spec
    every = spec.num_experts * spec.num_moe_layers
    arguments = ["simulate", *map(str, traced), "--slots", "3", "--slots", str(every)]
    arguments += ["--device", "rtx-3060", "--predictors", "--ctx", "64", "--foresight"]
    capsys.readouterr()
    assert run([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["num_tokens"] == 120 and document["device"] == "NVIDIA GeForce RTX 3060 12 GB"
    assert document["sources"] == load_device("rtx-3060").sources
    small, whole = document["sizes"]
    assert small["is_below_cycle"] and not whole["is_below_cycle"]  # two layers of top-2
    assert small["cycle_bytes"] == 4 * 2 * spec.expert_weights
    names = [each["policy"] for each in small["policies"]]
    assert names == ["next-use", "lru", "frequency", "pinned", "belady"]
    for each in small["policies"]:
        assert each["belady_share"] == each["hits"] / small["policies"][-1]["hits"] <= 1
        assert each["page_in_bytes"] == each["misses"] * 2 * spec.expert_weights
    assert {each["hit_rate"] for each in whole["policies"]} == {1.0}
    assert whole["limit"]["page_in_seconds"] == 0 < small["limit"]["page_in_seconds"]
    seen = small["foresight"]["seen"]
    assert [each["num_steps"] for each in seen] == [0, 1, 2, 4, 8, 16]
    assert seen[0]["hits"] == small["policies"][0]["hits"] < seen[2]["hits"]
    assert seen[-1]["belady_share"] <= 1
    assert [each["predictor"] for each in small["predictors"]][-1] == "exact"
    scores = {each["predictor"]: each for each in small["predictors"]}
    assert {"next router 2", "next router 4", "token prior 2", "token prior 4"} <= scores.keys()
    wide = scores["next router 4"]  # of eight; random weights, so that little changes in between
    assert wide["recall"] == wide["right"] / wide["missed"] and len(wide["layers"]) == 2
    assert wide["layers"][1]["recall"] > scores["token prior 4"]["layers"][1]["recall"]
    assert small["not_scored"][0].startswith("linear map: the trace holds no guesses")
    assert [each["predictor"] for each in small["timelines"]][0] == "none"
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    for words in (
        "of Belady's hits",
        "3 experts are below it",
        "uniform router",
        "page-in beside",
        "the next token",
    ):
        assert words in printed


def test_budgets_are_split_between_context_and_experts(
    traced: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["simulate", *map(str, traced), "--policy", "lru", "--device", "laptop-16gb"]
    assert run([*arguments, "--budget", "1MB"]) == 3
    assert "too small even when experts are paged" in capsys.readouterr().err
    assert run([*arguments, "--json"]) == 0  # the laptop's whole memory
    found = json.loads(capsys.readouterr().out)["sizes"][0]
    assert found["budget_bytes"] == 16 * 2**30
    contexts = [each["context_tokens"] for each in found["splits"]]
    longest = Checkpoint(traced[1]).spec.max_position_embeddings
    assert contexts == [n for n in (256, 512, 1024, 2048, 4096) if n <= longest] and contexts
    assert found["best_context_tokens"] in contexts
    kv = [each["kv_bytes"] for each in found["splits"]]
    assert kv == sorted(kv) and len(set(kv)) == len(kv)


def test_help_names_every_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("`this`", *device_names()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either --slots N or --budget SIZE"),
        (["--slots", "4", "--budget", "1GB"], "give one of them"),
        (["--slots", "4", "--policy", "clock"], "policy 'clock' is unknown"),
        (["--slots", "4", "--device", "abacus"], "device 'abacus' is unknown"),
        (["--slots", "4", "--ram", "1GB"], "--ram is a tier beside a GPU"),
        (["--slots", "4", "--ram", "1kB", "--device", "h200"], "add --storage-rate"),
        (["--slots", "1"], "1 slots are fewer than top_k=2"),
    ],
)
def test_refusals(
    options: list[str],
    message: str,
    traced: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["simulate", *map(str, traced), *options]) == 2
    assert message in capsys.readouterr().err
