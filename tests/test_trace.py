"""Traces: written, checked, and replayed to exactly what the runtime counted."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILY_NAMES, TinyCheckpoint
from hand_plan import hand_plan
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from edge_moe.checkpoint import Checkpoint
from edge_moe.cli import run
from edge_moe.converters.build import build
from edge_moe.errors import InputError
from edge_moe.formats import DROP
from edge_moe.runtime.allotment import (
    allot,
    dense_parameters,
    open_source,
    open_store,
    source_fingerprint,
)
from edge_moe.runtime.policies import DEFAULT_POLICY
from edge_moe.runtime.policy import LeastFrequentlyUsed, LeastRecentlyUsed, RoutedCounts
from edge_moe.runtime.replay import Room
from edge_moe.runtime.session import Session
from edge_moe.runtime.simulate import Simulation, simulate, traced_sizes
from edge_moe.runtime.skipping import RatioRule, SkipRule, TopP
from edge_moe.runtime.trace import NO_GUESS, Trace, TraceInfo, TraceRecorder
from edge_moe.runtime.traced_model import open_traced

PROMPT = list(range(5, 45))
INFO = TraceInfo(model_fingerprint="m", moe_layer_ids=(0, 3), top_k=2, kept=((0, 4, 5), (1, 2)))


def small_trace(rows: list[list[list[int]]], steps: list[int], info: TraceInfo = INFO) -> Trace:
    """[N][L][k] rows with weights 0.75, 0.25."""
    table = np.array(rows, np.uint16)
    weights = np.broadcast_to(np.array([0.75, 0.25], np.float16), table.shape)
    norms = np.ones(table.shape[:2], np.float32)
    return Trace(info, table, weights, norms, np.array(steps, np.uint32))


def test_round_trip_and_gate_means(tmp_path: Path) -> None:
    trace = small_trace([[[0, 2], [1, 0]], [[2, 1], [0, 1]]], [1, 1])
    trace.save(tmp_path / "t.safetensors")
    read = Trace.load(tmp_path / "t.safetensors")
    assert read.info == INFO
    for name in ("rows", "weights", "token_norms", "step_tokens"):
        np.testing.assert_array_equal(getattr(read, name), getattr(trace, name))
    means = read.gate_means(6)  # by expert id: rows 0, 1, 2 of layer 0 are experts 0, 4, 5
    assert means[0].tolist() == [0.375, 0, 0, 0, 0.125, 0.5]
    assert means[1].tolist() == [0, 0.5, 0.5, 0, 0, 0]


def test_token_ids_and_guesses_are_kept(tmp_path: Path) -> None:
    """A prompt of two tokens, then one token whose second layer was guessed, then half a step."""
    recorder = TraceRecorder()
    for token_ids in ([7, 8], [9], [10]):
        rows = np.array([[0, 1]] * len(token_ids))
        recorder.begin(token_ids)
        recorder.add_rows(0, rows)
        if len(token_ids) == 1:
            recorder.add_guess("router", 1, [1])
            recorder.add_guess("linear", 1, [1, 0])
        if token_ids != [10]:
            recorder.add_rows(1, rows)
    recorder.finish(INFO).save(tmp_path / "t.safetensors")
    trace = Trace.load(tmp_path / "t.safetensors")
    assert trace.token_ids is not None and trace.token_ids.tolist() == [7, 8, 9]
    no = NO_GUESS
    assert trace.guesses["router"].tolist() == [[[no], [no]]] * 2 + [[[no], [1]]]
    assert trace.guesses["linear"].tolist() == [[[no, no]] * 2] * 2 + [[[no, no], [1, 0]]]


def test_the_version_before_is_read(tmp_path: Path) -> None:
    info = INFO.model_copy(update={"version": 2})
    small_trace([[[0, 2], [1, 0]]], [1], info).save(tmp_path / "t.safetensors")
    trace = Trace.load(tmp_path / "t.safetensors")
    assert trace.token_ids is None and not trace.guesses and trace.num_tokens == 1


def test_interrupted_step_is_left_out() -> None:
    recorder = TraceRecorder()
    one = (np.array([[0, 1]]), np.array([[0.5, 0.5]]), np.array([1.0]))
    for layer in (0, 1, 0):
        recorder.add(layer, *one)
    trace = recorder.finish(INFO)
    assert trace.num_tokens == 1 and trace.step_tokens.tolist() == [1]
    assert TraceRecorder().finish(INFO).num_tokens == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": np.zeros((2, 2, 2), np.int64)}, "arrays are"),
        ({"rows": np.array(3, np.uint16)}, "rows have 0 dimensions"),
        ({"rows": np.zeros((0, 2, 2), np.uint16)}, "holds no token"),
        ({"rows": np.array([[[0, 9], [0, 1]]] * 2, np.uint16)}, "row 9 of 3 in layer 0"),
        ({"rows": np.array([[[1, 1], [0, 1]]] * 2, np.uint16)}, "chose a row twice"),
        ({"rows": np.zeros((2, 1, 2), np.uint16)}, r"rows are not \[2, 2, 2\]"),
        ({"weights": np.full((2, 2, 2), np.nan, np.float16)}, "a weight is no number"),
        ({"token_ids": np.zeros(3, np.uint32)}, r"token_ids are not \[2\]"),
        ({"token_ids": np.zeros(2, np.int32)}, "arrays are"),
        ({"guesses.router": np.zeros((2, 1, 2), np.uint16)}, "guesses.router are not"),
        ({"guesses.router": np.full((2, 2, 1), 2, np.uint16)}, "guesses.router: row 2 in layer 1"),
        ({"step_tokens": np.array([1], np.uint32)}, "steps do not add up"),
        ({"step_tokens": np.array([2, 0], np.uint32)}, "a step has no token"),
    ],
)
def test_damaged_traces(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    trace = small_trace([[[0, 2], [1, 0]], [[2, 1], [0, 1]]], [1, 1])
    arrays = {name: np.array(getattr(trace, name)) for name in ("rows", "weights", "token_norms")}
    arrays["step_tokens"] = trace.step_tokens
    metadata = {"edge_moe_trace": INFO.model_dump_json()}
    save_file(arrays | change, path, metadata=metadata)
    with pytest.raises(InputError, match=message):
        Trace.load(path)
    save_file(arrays, path)
    with pytest.raises(InputError, match="is no trace"):
        Trace.load(path)
    save_file(arrays, path, metadata={"edge_moe_trace": '{"version": 7}'})
    with pytest.raises(InputError, match="has version 7"):
        Trace.load(path)
    for text in (INFO.model_copy(update={"top_k": 0}).model_dump_json(), "[" * 10**5, "9" * 5000):
        save_file(arrays, path, metadata={"edge_moe_trace": text})
        with pytest.raises(InputError, match="is damaged|is not readable JSON"):
            Trace.load(path)
    save_torch({"rows": torch.zeros(2, dtype=torch.bfloat16)}, path, metadata=metadata)
    with pytest.raises(InputError, match="(is not readable|is damaged).*bfloat16"):
        Trace.load(path)
    path.write_bytes(b"no")
    with pytest.raises(InputError, match="is not readable"):
        Trace.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": np.array([5, 10**6], np.uint32)}, "has token 1000000 of"),
        ({"info": {"top_k": 3}}, "top_k=3, unlike the model it names"),
        ({"info": {"moe_layer_ids": (0, 3)}}, r"has MoE layers \[0, 3\]"),
        ({"info": {"kept": ((0, 1), (1, 9))}}, "expert 9 of MoE layer 1"),
    ],
)
def test_traces_that_contradict_their_model(
    change: dict[str, Any], message: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    traced = open_traced(tiny_checkpoint("olmoe"), "cpu")
    real = {"model_fingerprint": traced.fingerprint, "moe_layer_ids": (0, 1), "kept": ((0, 1),) * 2}
    trace = small_trace([[[0, 1], [1, 0]]] * 2, [1, 1], INFO.model_copy(update=real))
    trace = dataclasses.replace(trace, token_ids=np.array([5, 6], np.uint32))
    assert len(traced.sizes(trace)) == 2
    info = trace.info.model_copy(update=change.get("info", {}))
    with pytest.raises(InputError, match=message):
        traced.sizes(dataclasses.replace(trace, **(change | {"info": info})))


def test_replay_by_hand() -> None:
    """Slots hold (0, 0) and (0, 1) at first; steps ask rows 0 2 | 1 0, then 1 2 | 0 1."""
    info = INFO.model_copy(update={"kept": ((0, 4, 5), (1, 2, 3))})
    trace = small_trace([[[0, 2], [1, 0]], [[2, 1], [0, 1]]], [1, 1], info)
    found = simulate(trace, [[10] * 3] * 2, Room.of_slots({10: 2}), LeastRecentlyUsed)
    # (0,0) hit; (0,2), (1,0), (1,1), (0,1), (0,2), (1,0), (1,1) all miss: a cycle of 4 in 2 slots
    assert (found.hits, found.misses, found.evictions, found.page_in_bytes) == (1, 7, 7, 70)
    every = simulate(trace, [[10] * 3] * 2, Room.of_slots({10: 6}), LeastFrequentlyUsed)
    assert (every.hits, every.misses, every.hit_rate) == (8, 0, 1.0)
    light = simulate(
        trace, [[10] * 3] * 2, Room.of_slots({10: 2}), LeastRecentlyUsed, RatioRule([0.5, 0.5])
    )
    # what stays: (0,0), (1,1) | (0,2), (1,0)
    assert (light.skipped_experts, light.hits, light.misses) == (4, 1, 3)
    assert light.page_in_bytes_per_token == 15


@pytest.mark.parametrize(
    ("rule", "active", "parameters", "saved_bytes"),
    [
        (None, 4, 1000 + 4 * 6, 0),
        (RatioRule([0.5, 0.5]), 2, 1000 + 2 * 6, (30 + 1 + 20 + 2) / 2),
        (RatioRule([0.5, 0.0]), 3, 1000 + 3 * 6, (30 + 20) / 2),  # layer 1 skips nothing
    ],
    ids=["none", "both layers", "one layer"],
)
def test_cost_by_hand_of_experts_of_several_sizes(
    rule: SkipRule | None, active: int, parameters: int, saved_bytes: float
) -> None:
    """Per token of a dense part of 1000 weights and experts of 6, whose bytes all differ."""
    info = INFO.model_copy(update={"kept": ((0, 4, 5), (1, 2, 3))})
    trace = small_trace([[[0, 2], [1, 0]], [[2, 1], [0, 1]]], [1, 1], info)
    sizes = [[10, 20, 30], [1, 2, 4]]
    slots = dict.fromkeys((10, 20, 30, 1, 2, 4), 1)
    found = simulate(trace, sizes, Room.of_slots(slots), LeastRecentlyUsed, rule)
    cost = found.cost(dense_parameters=1000, expert_parameters=6)
    assert cost.rule == (rule.name if rule else "none")
    assert (cost.routed_per_token, cost.active_per_token) == (4, active)
    assert cost.active_parameters == parameters
    # token 0 chooses 10 + 30 and 2 + 1 bytes, token 1 30 + 20 and 1 + 2
    assert cost.routed_bytes_per_token == (43 + 53) / 2
    assert cost.saved_bytes_per_token == saved_bytes
    assert cost.active_bytes_per_token == 48 - saved_bytes
    assert cost.saved_share == saved_bytes / 48


def test_cost_of_no_token_is_that_of_the_dense_part() -> None:
    trace = TraceRecorder().finish(INFO)
    cost = simulate(trace, [[10] * 3, [10] * 2], Room.of_slots({10: 5}), LeastRecentlyUsed).cost(
        dense_parameters=1000, expert_parameters=6
    )
    assert (cost.active_parameters, cost.routed_bytes_per_token, cost.saved_share) == (1000, 0, 0)


def test_a_step_asks_for_every_expert_once() -> None:
    info = INFO.model_copy(update={"kept": ((0, 4, 5), (1, 2, 3))})
    trace = small_trace([[[0, 2], [1, 0]], [[2, 0], [0, 1]]], [2], info)
    found = simulate(trace, [[10] * 3] * 2, Room.of_slots({10: 6}), LeastRecentlyUsed)
    assert found.hits == 4 and found.num_steps == 1
    assert found.routed_bytes == 8 * 10  # but every token counts its own


def replay(folder: Path, trace: Trace, num_slots: int, skip: SkipRule | None) -> Simulation:
    source = open_source(folder)
    sizes = traced_sizes(trace, open_store(source), source_fingerprint(source))
    slots = allot(source.spec, sizes, [], None, num_slots)
    return simulate(trace, sizes, Room.of_slots(slots.counts), DEFAULT_POLICY, skip)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("rule", [None, TopP(0.6)], ids=["none", "top-p"])
def test_replay_counts_what_the_runtime_counted(
    family: str, rule: SkipRule | None, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Below one token cycle, above it, and with everything resident."""
    folder = tiny_checkpoint(family)
    every = Checkpoint(folder).spec.num_experts * Checkpoint(folder).spec.num_moe_layers
    for num_slots in (3, 5, 9, every):
        with Session.open(folder, num_slots=num_slots, prefetch=False, skip=rule) as session:
            with session.tracing() as recorder:
                session.generate_ids(PROMPT, 24, stop_at_eos=False)
                session.logits(list(range(300)))  # two pieces of a prompt, in a fresh context
            real = session.statistics()
            recorder.finish(session.trace_info()).save(tmp_path / "t.safetensors")
        trace = Trace.load(tmp_path / "t.safetensors")
        found = replay(folder, trace, num_slots, rule)
        assert trace.token_ids is not None
        assert trace.token_ids[: len(PROMPT)].tolist() == PROMPT
        assert trace.token_ids[-300:].tolist() == list(range(300))
        if num_slots == every:
            check_guesses(trace, folder)
        assert found.num_tokens == len(PROMPT) + 23 + 300 and found.num_steps == 26
        assert (found.hits, found.misses) == (real.hits, real.misses)
        assert (found.evictions, found.page_in_bytes) == (real.evictions, real.page_in_bytes)
        assert found.routed_experts == real.routed_experts
        assert found.skipped_experts == real.skipped_experts
        if rule is not None:  # a session counts these with a rule only
            assert simulated_counts(found) == real.routed


def check_guesses(trace: Trace, folder: Path) -> None:
    """Twice top_k different rows for every layer but the first, of single tokens alone."""
    spec = Checkpoint(folder).spec
    if spec.latent_width:
        assert not trace.guesses
        return
    guesses, single = trace.guesses["router"], np.repeat(trace.step_tokens, trace.step_tokens) == 1
    assert (guesses[~single] == NO_GUESS).all() and (guesses[:, 0] == NO_GUESS).all()
    ordered = np.sort(guesses[single][:, 1:], axis=2)
    assert ordered.shape[2] == 2 * spec.top_k and (ordered[:, :, 1:] > ordered[:, :, :-1]).all()
    with Session.open(folder) as session, torch.inference_mode():
        hidden = torch.randn(1, spec.hidden_size, generator=torch.Generator().manual_seed(0))
        block, hidden = session._blocks[1], hidden.to(session.model.dtype)
        ranked, chosen = block.ranked(hidden, 2 * spec.top_k), block.choose(hidden)[0][0].tolist()
        assert ranked[: spec.top_k] == chosen and len(ranked) == 2 * spec.top_k


def simulated_counts(found: Simulation) -> RoutedCounts:
    return RoutedCounts(
        found.routed_experts, found.skipped_experts, found.routed_bytes, found.skipped_bytes
    )


def test_replay_of_a_package_with_several_sizes(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("qwen3_moe", wide=True)
    forms = [
        ["bf16", DROP, "q8_0", "q4_k", DROP, "q8_0", "q4_k", "bf16"],
        [DROP, DROP, "q8_0", "q4_k", "q4_k", DROP, "bf16", "q8_0"],
    ]
    package = build(hand_plan(Checkpoint(folder), forms), tmp_path / "out")
    for rule in (None, TopP(0.6)):
        with Session.open(package, num_slots=6, prefetch=False, skip=rule) as session:
            with session.tracing() as recorder:
                session.generate_ids(PROMPT, 24, stop_at_eos=False)
            trace, real = recorder.finish(session.trace_info()), session.statistics()
        found = replay(package, trace, 6, rule)
        assert (found.hits, found.misses) == (real.hits, real.misses)
        assert found.page_in_bytes == real.page_in_bytes
    assert simulated_counts(found) == real.routed
    assert 0 < real.skipped_bytes < real.routed_bytes
    other = trace.info.model_copy(update={"kept": ((0, 1), (2, 3))})
    with pytest.raises(InputError, match="expert 1 of MoE layer 0, which this package dropped"):
        replay(package, dataclasses.replace(trace, info=other), 6, None)
    with pytest.raises(InputError, match="recorded with another model"):
        replay(tiny_checkpoint("olmoe"), trace, 6, None)


def test_command_line(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """run --trace, then simulate in a process that must not import torch."""
    folder, trace = tiny_checkpoint("olmoe"), tmp_path / "t.safetensors"
    run_options = ["--prompt", "hello there", "--max-new-tokens", "8", "--slots", "5"]
    assert (
        run(["run", str(folder), *run_options, "--no-prefetch", "--trace", str(trace), "--json"])
        == 0
    )
    real = json.loads(capsys.readouterr().out)["paging"]
    code = (
        "import sys; from edge_moe.cli import run; code = run(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    arguments = [
        "simulate",
        str(trace),
        str(folder),
        "--slots",
        "5",
        "--skip",
        "top-p=0.5",
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)["sizes"][0]
    plain, skipped = found["skipping"]
    assert found["policies"][0]["hits"] == plain["hits"]
    assert (plain["hits"], plain["misses"]) == (real["hits"], real["misses"])
    assert plain["page_in_bytes_per_token"] == real["page_in_bytes"] / plain["num_tokens"]
    assert skipped["rule"] == "top-p=0.5" and skipped["misses"] < plain["misses"]
    source = open_source(folder)
    weights, dense = source.spec.expert_weights, dense_parameters(source)
    for each in (plain, skipped):
        assert each["routed_per_token"] == 4  # two layers of top-2, of two-byte weights
        assert each["active_parameters"] == dense + each["active_per_token"] * weights
        assert each["routed_bytes_per_token"] == 4 * 2 * weights
        computed = each["active_per_token"] * 2 * weights
        assert each["saved_bytes_per_token"] == pytest.approx(8 * weights - computed)
    assert skipped["active_per_token"] < plain["active_per_token"] == 4
    arguments.remove("--json")
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    assert "tokens in" in printed and "active parameters" in printed
    share = skipped["saved_bytes_per_token"] / skipped["routed_bytes_per_token"]
    assert f"per token ({share:.1%})" in printed
