"""Statistics are exact sums: no order of adding or merging changes a bit."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_moe.errors import StatsError
from edge_moe.exact_sum import ExactSum
from edge_moe.plan import CalibrationOptions
from edge_moe.stats import EXPERT_SUMS, LAYER_SUMS, STATS_VERSION, ExpertStats, StatsInfo

finite = st.floats(-1e9, 1e9, allow_nan=False, width=64)


def make_info(**changes: Any) -> StatsInfo:
    fields: dict[str, Any] = {
        "version": STATS_VERSION,
        "edge_moe_version": "0",
        "model_type": "qwen3_moe",
        "model_fingerprint": "m",
        "tokenizer_fingerprint": "t",
        "data_fingerprint": "d",
        "tasks": ("python",),
        "window_tokens": 4,
        "num_windows": 3,
        "windows": (0,),
        "num_tokens": 4,
        "moe_layer_ids": (0, 1),
        "num_experts": 3,
        "top_k": 1,
        "forms": ("drop", "q8_0"),
    }
    return StatsInfo(**(fields | changes))


def random_stats(window: int) -> ExpertStats:
    stats = ExpertStats.zeros(make_info(windows=(window,)))
    rng = np.random.default_rng(window)
    stats.routed_tokens += rng.integers(0, 9, stats.routed_tokens.shape)
    stats.max_output[:] = rng.random(stats.max_output.shape)
    for name in EXPERT_SUMS:
        stats.expert_sums[name].add(rng.lognormal(0, 6, (2, 3)))
    for name in LAYER_SUMS:
        stats.layer_sums[name].add(rng.random(2))
    stats.form_loss.add(rng.random((2, 3, 2)))
    return stats


def assert_same(left: ExpertStats, right: ExpertStats) -> None:
    assert left.info == right.info
    arrays, others = left.to_arrays(), right.to_arrays()
    assert arrays.keys() == others.keys()
    for name in arrays:
        np.testing.assert_array_equal(arrays[name], others[name], err_msg=name)


@given(st.lists(finite, min_size=1, max_size=30), st.randoms())
def test_sums_do_not_depend_on_order_or_grouping(values: list[float], random: Any) -> None:
    forwards = ExactSum.zeros(())
    for value in values:
        forwards.add(value)
    shuffled = list(values)
    random.shuffle(shuffled)
    cut = random.randint(0, len(values))
    parts = [ExactSum.zeros(()), ExactSum.zeros(())]
    for position, value in enumerate(shuffled):
        parts[position < cut].add(value)
    parts[0].merge(parts[1])
    assert (parts[0].high, parts[0].low) == (forwards.high, forwards.low)


@given(st.lists(finite, min_size=1, max_size=30))
def test_sums_are_right(values: list[float]) -> None:
    total = ExactSum.zeros(())
    for value in values:
        total.add(value)
    exact = sum(map(Fraction, values))
    stored = Fraction(int(total.high), 2**8) + Fraction(int(total.low), 2**60)
    assert abs(stored - exact) <= Fraction(len(values), 2**60)
    assert math.isclose(float(total.values()), float(exact), rel_tol=1e-15, abs_tol=2**-53)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**53])
def test_sums_refuse_what_they_cannot_hold(value: float) -> None:
    with pytest.raises(OverflowError):
        ExactSum.zeros((2,)).add([1.0, value])


@settings(deadline=None)
@given(st.permutations([0, 1, 2]))
def test_merging_in_any_order_gives_the_same_bits(order: list[int]) -> None:
    parts = [random_stats(window) for window in range(3)]
    expected = parts[0].merge(parts[1]).merge(parts[2])
    first, second, third = (parts[index] for index in order)
    assert_same(first.merge(second.merge(third)), expected)
    assert expected.info.windows == (0, 1, 2)
    assert expected.info.num_tokens == 12


def test_merging_joins_the_options_until_the_text_is_whole() -> None:
    parts = [random_stats(window) for window in range(3)]
    for index, part in enumerate(parts):
        options = CalibrationOptions(
            tasks=("code",),
            window_tokens=4,
            max_windows=None,
            forms=part.info.forms,
            shards=((index, 3),),
        )
        part.info = part.info.model_copy(update={"options": options})
    two = parts[2].merge(parts[0])
    assert two.info.options is not None and two.info.options.shards == ((0, 3), (2, 3))
    three = two.merge(parts[1])
    assert three.info.options is not None and three.info.options.shards == ((0, 1),)


def test_merging_refuses_strangers_and_repetition() -> None:
    stats = random_stats(0)
    with pytest.raises(StatsError, match="window 0 is in both"):
        stats.merge(random_stats(0))
    for change in ({"model_fingerprint": "x"}, {"forms": ("drop", "q4_0")}, {"window_tokens": 8}):
        other = ExpertStats.zeros(make_info(windows=(1,), **change))
        with pytest.raises(StatsError, match=f"cannot merge: {next(iter(change))}"):
            stats.merge(other)


def test_merging_two_tasks_names_the_tasks_not_their_hashes() -> None:
    prose = make_info(windows=(1,), tasks=("prose",), data_fingerprint="f" * 64)
    with pytest.raises(StatsError) as caught:
        random_stats(0).merge(ExpertStats.zeros(prose))
    message = str(caught.value)
    assert "cannot merge: tasks is" in message and "'prose'" in message
    assert "merge only shards of one run" in message and "ffff" not in message


def test_saved_statistics_come_back(tmp_path: Path) -> None:
    stats = random_stats(2)
    stats.save(tmp_path / "stats")
    assert_same(ExpertStats.load(tmp_path / "stats"), stats)
    assert stats.form_index("q8_0") == 1
    with pytest.raises(StatsError, match="no loss for form 'q4_0'"):
        stats.form_index("q4_0")


def test_damaged_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StatsError, match="no finished statistics"):
        ExpertStats.load(tmp_path)
    stats = random_stats(0)
    stats.save(tmp_path)
    whole = (tmp_path / "stats.safetensors").read_bytes()
    (tmp_path / "stats.safetensors").write_bytes(whole[:-1])
    with pytest.raises(StatsError, match="is damaged"):
        ExpertStats.load(tmp_path)
    (tmp_path / "stats.safetensors").write_bytes(whole)
    info = json.loads((tmp_path / "stats.json").read_text())
    for change, message in [
        ({"version": 99}, "has version 99"),
        ({"num_experts": 4}, "misshapen"),
        ({"surprise": 1}, "is damaged"),
    ]:
        (tmp_path / "stats.json").write_text(json.dumps(info | change))
        with pytest.raises(StatsError, match=message):
            ExpertStats.load(tmp_path)
