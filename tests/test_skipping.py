"""Skipping rules: worked out by hand, bounded by properties, and exact in the runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import FAMILY_NAMES, TinyCheckpoint, make_tiny_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from peak_memory import deep_checkpoint, measure_peak, needs_proc

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.calibrate_skipping import calibrate_skipping, skipping_terms
from edge_moe.converters.calibration_work import HiddenWriter
from edge_moe.errors import EdgeMoeError, InputError, StatsError, TargetError
from edge_moe.runtime.evaluate import evaluate
from edge_moe.runtime.session import Session
from edge_moe.runtime.skipping import (
    OnlineDynamicPruning,
    RatioRule,
    SkipRule,
    TopP,
    load_skip,
    median_ratio,
    parse_skip,
    rescaled_weights,
)
from edge_moe.skip_calibration import SkipCalibration
from edge_moe.tasks import task_windows

PROMPT = list(range(5, 45))
TOP_4 = np.array([[0.5, 0.25, 0.125, 0.125], [0.0625, 0.125, 0.3125, 0.5], [0.25] * 4])


def test_ratio_rule_by_hand() -> None:
    """Against half of the largest weight, in whatever order the experts come."""
    found = RatioRule([0.0, 0.5]).skips(1, TOP_4)
    assert found.tolist() == [
        [False, False, True, True],
        [True, True, False, False],
        [False] * 4,
    ]
    assert not RatioRule([0.0, 0.5]).skips(0, TOP_4).any()
    assert not RatioRule([1.0]).skips(0, TOP_4)[2].any()  # the heaviest never goes, nor its equals


def test_top_p_by_hand() -> None:
    """The expert that crosses p stays; p itself is not yet exceeded."""
    assert TopP(0.6).skips(0, TOP_4).tolist() == [
        [False, False, True, True],
        [True, True, False, False],
        [False, False, False, True],
    ]
    assert TopP(0.5).skips(0, TOP_4)[0].tolist() == [False, False, True, True]
    assert TopP(0.4).skips(0, TOP_4)[0].tolist() == [False, True, True, True]
    assert TopP(0.4).skips(0, 2.5 * TOP_4).tolist() == TopP(0.4).skips(0, TOP_4).tolist()


def test_odp_protects_the_loudest_prompt_tokens_only() -> None:
    weights = np.tile([[0.75, 0.25]], (60, 1))
    norms = np.arange(60.0)
    found = OnlineDynamicPruning([0.5]).skips(0, weights, norms)
    assert found[:, 1].tolist() == [True] * 58 + [False] * 2  # 2 % of 60, rounded up
    assert not found[:, 0].any()
    assert OnlineDynamicPruning([0.5]).skips(0, weights[:1], norms[59:]).tolist() == [[False, True]]
    assert RatioRule([0.5]).skips(0, weights).sum() == 60


def test_the_rest_keeps_the_sum_and_untouched_tokens_their_bits() -> None:
    weights = np.array([[0.6, 0.2, 0.2], [0.1, 0.3, 0.7]], np.float32)
    is_skipped = np.array([[False, True, False], [False] * 3])
    found = rescaled_weights(weights, is_skipped)
    assert found[0] == pytest.approx([0.75, 0, 0.25])
    assert found[1].tobytes() == weights[1].tobytes()
    assert RatioRule([0.5]).remaining(weights, is_skipped).tolist() == found.tolist()
    assert TopP(0.5).remaining(weights, is_skipped)[0] == pytest.approx([0.6, 0, 0.2])


def test_median_ratio_by_hand() -> None:
    """Ratios 1/2, 1/4; 1, 1/5; the median of all four is (1/4 + 1/2) / 2."""
    weights = np.array([[0.2, 0.4, 0.1], [0.5, 0.1, 0.5], [0.0, 0.0, 0.0]])
    assert median_ratio(weights) == pytest.approx(0.375)
    assert median_ratio(np.ones((3, 1))) == 0.0


RULES: list[SkipRule] = [RatioRule([0.3]), OnlineDynamicPruning([0.7]), TopP(0.5), TopP(1.0)]
WEIGHTS = st.lists(
    st.lists(st.floats(0, 4, width=32), min_size=4, max_size=4), min_size=1, max_size=40
)


@given(WEIGHTS, st.sampled_from(RULES))
def test_any_rule_keeps_the_heaviest_and_the_sum(table: list[list[float]], rule: SkipRule) -> None:
    weights = np.array(table, np.float32)
    norms = np.ones(len(weights), np.float32)
    is_skipped = rule.skips(0, weights, norms)
    rounded = weights.astype(np.float16)
    largest = rounded.max(axis=1, keepdims=True)
    assert ((rounded == largest) & ~is_skipped).any(axis=1).all()
    lightest_kept = np.where(is_skipped, np.inf, rounded).min(axis=1, keepdims=True)
    assert (np.where(is_skipped, rounded, -np.inf) <= lightest_kept).all()
    kept = rescaled_weights(weights, is_skipped)
    assert kept.sum(axis=1) == pytest.approx(weights.sum(axis=1), rel=1e-3, abs=1e-6)
    assert (kept[is_skipped] == 0).all()
    assert np.array_equal(is_skipped, rule.skips(0, rounded, norms))  # what a trace would say


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_rule_that_skips_nothing_changes_no_bit(
    family: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    folder = tiny_checkpoint(family)
    nothing = RatioRule([0.0] * Checkpoint(folder).spec.num_moe_layers)
    with Session.open(folder, num_slots=6) as plain:
        logits, tokens = plain.logits(PROMPT), plain.generate_ids(PROMPT, 8, stop_at_eos=False)
    for rule in (nothing, TopP(1.0)):
        with Session.open(folder, num_slots=6, skip=rule) as session:
            np.testing.assert_array_equal(session.logits(PROMPT), logits)
            assert session.generate_ids(PROMPT, 8, stop_at_eos=False) == tokens
            assert session.statistics().skipped_experts == 0
            assert session.statistics().routed_experts > 0


def test_skipping_all_but_one_is_the_model_with_top_1(tmp_path: Path) -> None:
    """With renormalised weights, in prefill and in decoding, and counted to the byte."""
    folder = make_tiny_checkpoint(tmp_path / "model", "qwen3_moe")
    rule = RatioRule([1.0, 1.0])  # everything lighter than the heaviest goes
    with Session.open(folder, skip=rule) as session:
        logits, tokens = session.logits(PROMPT), session.generate_ids(PROMPT, 8, stop_at_eos=False)
        found = session.statistics()
    assert found.routed_experts == 2 * found.skipped_experts > 0
    assert found.routed_bytes == 2 * found.skipped_bytes
    record = session.spec.expert_weights * 2
    assert found.skipped_bytes == found.skipped_experts * record
    assert found.not_paged_bytes == 0  # every expert has a slot
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_experts_per_tok": 1}))
    with Session.open(folder) as session:
        np.testing.assert_allclose(session.logits(PROMPT), logits, atol=1e-5)
        assert session.generate_ids(PROMPT, 8, stop_at_eos=False) == tokens


def test_skipped_experts_are_not_paged_in(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("olmoe")
    counts = {}
    for rule in (None, TopP(1e-6)):
        for prefetch in (False, True):
            with Session.open(folder, num_slots=4, prefetch=prefetch, skip=rule) as session:
                session.generate_ids(PROMPT, 16, stop_at_eos=False)
                session.check_integrity()
                counts[rule is not None, prefetch] = session.statistics()
    assert counts[True, False].misses < counts[False, False].misses
    assert counts[True, False].page_in_bytes < counts[False, False].page_in_bytes
    assert counts[True, False].not_paged_bytes > 0
    assert counts[True, True].skipped_experts == counts[True, False].skipped_experts


def test_eval_shows_what_skipping_saves(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    task = tmp_path / "text.txt"
    task.write_text("the cat sat on the mat and the dog sat on the log\n" * 4)
    (result,) = evaluate(folder, folder, [str(task)], window_tokens=64, skip=TopP(1e-6))
    assert result.comparison is not None and result.comparison.mean_kld.value > 1e-4
    cost = result.skipping
    assert cost is not None and cost.rule == "top-p=1e-06"
    assert (cost.routed_per_token, cost.active_per_token) == (4, 2)  # two layers of top-2
    assert cost.saved_bytes_per_token == cost.routed_bytes_per_token / 2
    with Session.open(folder) as session:
        weights = session.spec.expert_weights
        assert cost.active_parameters == session.dense_parameters + 2 * weights
        assert cost.routed_bytes_per_token == 4 * 2 * weights  # four experts of two-byte weights
    (plain,) = evaluate(folder, folder, [str(task)], window_tokens=64)
    assert plain.skipping is None
    with pytest.raises(TargetError, match="llama.cpp, which cannot skip"):
        evaluate(tmp_path / "x.gguf", None, [str(task)], skip=TopP(0.5))


IMPORTS = """
import sys
from pathlib import Path
from edge_moe.converters.calibrate_skipping import calibrate_skipping
"""
MEASURED = """
model, task, output = sys.argv[1:]
calibrate_skipping(Path(model), [task], Path(output), window_tokens=128)
"""


@pytest.mark.slow
@needs_proc
def test_memory_of_calibration_stays_below_what_is_stated(tmp_path: Path) -> None:
    folder = deep_checkpoint(tmp_path / "model")
    task, output = tmp_path / "mine.txt", tmp_path / "skip.json"
    task.write_text(" ".join(f"word{index % 37} is {index}" for index in range(500)))
    peak = measure_peak(IMPORTS, MEASURED, folder, task, output)
    checkpoint, found = Checkpoint(folder), SkipCalibration.load(output)
    terms = skipping_terms(checkpoint, found.num_tokens, 128)
    stated_bytes = sum(term.num_bytes for term in terms)
    whole_bytes = 2 * sum(info.num_bytes for info in checkpoint.tensors.values())  # as float32
    assert peak.grown_bytes <= stated_bytes < 0.5 * whole_bytes
    ratios = next(term for term in terms if term.name == "ratios")
    assert ratios.num_bytes == 8 * (checkpoint.spec.top_k - 1) * found.num_tokens
    said = f"calibrating skipping on {found.num_tokens} tokens"
    assert said in " ".join(peak.stderr.split())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_calibrated_medians_are_those_of_a_trace(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """The second implementation: the runtime's own routing of the same window."""
    folder, task = tiny_checkpoint(family), tmp_path / "text.txt"
    task.write_text("it was the best of times, it was the worst of times " * 2)
    found = calibrate_skipping(folder, [str(task)], tmp_path / "skip.json", window_tokens=64)
    assert found == SkipCalibration.load(tmp_path / "skip.json")
    assert [path.name for path in tmp_path.iterdir() if "work" in path.name] == []
    with Session.open(folder) as session:
        windows = task_windows([str(task)], "calibration", session.tokenizer, 64)
        with session.tracing() as recorder:
            for window in windows:
                session.logits(window)
        trace = recorder.finish(session.trace_info())
    expected = [median_ratio(trace.weights[:, layer]) for layer in range(len(found.moe_layer_ids))]
    assert found.median_ratios == pytest.approx(expected, rel=2e-3)
    assert found.num_tokens == trace.num_tokens
    rule = load_skip("naee", tmp_path / "skip.json", folder)
    skipped = np.mean(
        [rule.skips(layer, trace.weights[:, layer]).sum() for layer in range(len(expected))]
    )
    assert skipped == pytest.approx(trace.num_tokens / 2, abs=2)  # half of the second experts


def test_calibration_resumes_and_belongs_to_its_model(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_moe.converters import calibrate_skipping as module

    folder, task, output = tiny_checkpoint("olmoe"), tmp_path / "t.txt", tmp_path / "skip.json"
    task.write_text("a stitch in time saves nine " * 10)
    whole = calibrate_skipping(folder, [str(task)], tmp_path / "whole.json", window_tokens=32)
    layer = module._Pass._layer
    ran: list[int] = []

    def dies_in_layer_1(self: module._Pass, layer_id: int, writer: HiddenWriter) -> None:
        ran.append(layer_id)
        if layer_id == 1 and ran.count(1) == 1:
            raise KeyboardInterrupt
        layer(self, layer_id, writer)

    monkeypatch.setattr(module._Pass, "_layer", dies_in_layer_1)
    with pytest.raises(KeyboardInterrupt):
        calibrate_skipping(folder, [str(task)], output, window_tokens=32)
    assert not output.exists()
    assert calibrate_skipping(folder, [str(task)], output, window_tokens=32) == whole
    assert ran == [0, 1, 1]
    with pytest.raises(InputError, match="already exists"):
        calibrate_skipping(folder, [str(task)], output, window_tokens=32)
    with pytest.raises(StatsError, match="belongs to another model"):
        load_skip("odp", output, tiny_checkpoint("mixtral"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("odp", "'odp' compares with calibrated medians: give --skip-calibration"),
        ("top-p=2", "top-p=2 is out of range"),
        ("top-p=nan", "top-p=nan is out of range"),
        ("top-p=half", "top-p='half' is not a number"),
        ("top-p", "'top-p' is unknown: use one of odp, naee, top-p=P"),
    ],
)
def test_rules_refuse_nonsense(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_skip(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "has version 9"),
        ({"median_ratios": [0.5, 1.5]}, "damaged: median_ratios.1"),
        ({"median_ratios": [0.5]}, "1 ratios for 2 layers"),
        ({"extra": 1}, "damaged: extra"),
    ],
)
def test_damaged_calibration(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "skip.json"
    good = SkipCalibration(
        edge_moe_version="0",
        model_type="olmoe",
        model_fingerprint="m",
        tokenizer_fingerprint="t",
        data_fingerprint="d",
        tasks=("code",),
        window_tokens=4,
        num_windows=1,
        num_tokens=4,
        moe_layer_ids=(0, 1),
        top_k=2,
        median_ratios=(0.5, 0.25),
    )
    good.save(path)
    assert parse_skip("odp", SkipCalibration.load(path)).name == "odp"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(EdgeMoeError, match=message):
        SkipCalibration.load(path)
