"""Traces of GGUF files: the rows that the native runtime records, replayed to what was paged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import simulated_paging
from conftest import TinyCheckpoint
from float32_gguf import float32_gguf
from gguf_files import requantised

from edge_moe.cli import run
from edge_moe.errors import InputError
from edge_moe.gguf_model import GgufModel
from edge_moe.profiles import load_device
from edge_moe.runtime.gguf_allotment import expert_limit_bytes
from edge_moe.runtime.gguf_session import GgufSession
from edge_moe.runtime.policies import DEFAULT_POLICY
from edge_moe.runtime.record_trace import feed
from edge_moe.runtime.session import Session
from edge_moe.runtime.simulate import Replay, simulate
from edge_moe.runtime.skipping import TopP
from edge_moe.runtime.trace import Trace
from edge_moe.runtime.traced_model import open_traced

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

WINDOWS = [[int(i) for i in np.random.default_rng(n).integers(1, 250, 40)] for n in range(3)]


@pytest.fixture(scope="module")
def model(
    tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """(checkpoint, the same in a float32 file)"""
    folder = tiny_checkpoint("qwen3_moe")
    return folder, float32_gguf(folder, tmp_path_factory.mktemp("gguf") / "model.gguf")


def recorded(session: Session | GgufSession, prompt_tokens: int = 8) -> Trace:
    with session.tracing() as recorder:
        feed(session, WINDOWS, prompt_tokens)
    return recorder.finish(session.trace_info())


def test_both_engines_record_the_same_rows(model: tuple[Path, Path], tmp_path: Path) -> None:
    folder, file = model
    with Session.open(folder, context_tokens=64) as native:
        expected = recorded(native)
    with GgufSession.open(file, context_tokens=64, can_trace=True) as session:
        assert not session.is_paging
        found = recorded(session)
    found.save(tmp_path / "t.safetensors")
    found = Trace.load(tmp_path / "t.safetensors")
    assert found.step_tokens.tolist() == expected.step_tokens.tolist() == ([8] + [1] * 32) * 3
    np.testing.assert_array_equal(np.sort(found.rows, 2), np.sort(expected.rows, 2))
    assert found.token_ids is not None and expected.token_ids is not None
    assert found.token_ids.tolist() == expected.token_ids.tolist() == sum(WINDOWS, [])
    guesses = [each.guesses["router"] for each in (found, expected)]
    assert np.mean(guesses[0] == guesses[1]) > 0.98  # but for scores that are all but equal
    assert expected.info.has_weights and expected.weights.any()
    assert not found.info.has_weights and not found.weights.any()
    with pytest.raises(InputError, match="no weights of experts, by which --skip chooses"):
        Replay(found, open_traced(file, "cpu").sizes(found), TopP(0.5))
    with pytest.raises(InputError, match="holds no weights"):
        found.gate_means(8)


@pytest.mark.parametrize("command", ["run", "trace", "fit-guesses"])
def test_slots_beside_a_budget_are_refused(
    command: str, model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--task", "code", "-o", str(tmp_path / "o.safetensors")]
    given = ["--prompt", "a", "--raw"] if command == "run" else given
    for path in model[: 1 if command == "fit-guesses" else 2]:
        assert run([command, str(path), *given, "--slots", "4", "--budget", "1GB"]) == 2
        assert "give one of them" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(InputError, match="give one of them"):
        Session.open(model[0], num_slots=4, budget_bytes=10**9)
    with pytest.raises(InputError, match="give one of them"):
        expert_limit_bytes(GgufModel(model[1]), [], 10**9, 4)


@pytest.mark.parametrize("command", ["run", "trace"])
def test_a_linear_map_is_refused(
    command: str, model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--task", "code", "-o", str(tmp_path / "o.safetensors")]
    given = ["--prompt", "a", "--raw"] if command == "run" else given
    assert run([command, str(model[1]), *given, "--linear-map", "m.safetensors"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "runs in llama.cpp" in said and "leave out --linear-map" in said


def test_only_watched_routers_can_be_traced(model: tuple[Path, Path]) -> None:
    with GgufSession.open(model[1], context_tokens=64) as session:
        with pytest.raises(InputError, match="routers are not watched"), session.tracing():
            pass


@pytest.mark.parametrize("kind", ["float32", "quantised"])
def test_replay_counts_what_was_paged(kind: str, model: tuple[Path, Path], tmp_path: Path) -> None:
    """Quantised experts end anywhere in a page, so that they take different numbers of pages."""
    file = model[1]
    if kind == "quantised":
        types = {"ffn_(gate|up)_exps": "Q4_0", "ffn_down_exps": "Q8_0"}
        file = requantised(file, tmp_path / "q.gguf", types)
    traced = open_traced(file, "cpu")
    with GgufSession.open(file, context_tokens=64, can_trace=True) as whole:
        trace = recorded(whole)
    for num_slots in (2, 5, 9):
        with GgufSession.open(
            file, context_tokens=64, num_slots=num_slots, prefetch=False
        ) as session:
            recorded(session)  # of prompts only then the last layer computes every token
            real, limit = session.statistics(), session._experts.limit_bytes
        sizes = traced.sizes(trace)
        room = traced.room(sizes, traced.terms(64, has_budget=False), None, num_slots)
        assert room.num_bytes == limit
        found = simulate(trace, sizes, room, DEFAULT_POLICY)
        assert (found.hits, found.misses) == (real.hits, real.misses)
        assert (found.evictions, found.page_in_bytes) == (real.evictions, real.page_in_bytes)


def test_a_trace_of_other_experts_is_refused(model: tuple[Path, Path]) -> None:
    traced = open_traced(model[1], "cpu")
    with GgufSession.open(model[1], context_tokens=64, can_trace=True) as session:
        trace = recorded(session)
    kept = ((*trace.info.kept[0], 8), *trace.info.kept[1:])
    info = trace.info.model_copy(update={"kept": kept})
    with pytest.raises(InputError, match="other experts than the 8 of this file"):
        traced.sizes(dataclasses.replace(trace, info=info))


def test_paging_is_foretold_pair_by_pair(model: tuple[Path, Path]) -> None:
    """Times are whatever they are; hits agree, and one pair fixes the prediction of the others."""
    keys = [(0.25, "next-use"), (0.5, "lru"), (0.75, "pinned")]
    found = simulated_paging.compare(model[1], WINDOWS[0], 1, keys)
    assert all(pair.hits_agree for pair in found.pairs)
    assert [pair.num_slots for pair in found.pairs] == [4, 8, 12]
    fixed, *foretold = json.loads(found.model_dump_json())["pairs"]
    assert fixed["fixed_the_prediction"] and fixed["ratio"] == pytest.approx(1)
    for pair in foretold:
        assert not pair["fixed_the_prediction"] and pair["median_seconds"] > 0
        assert pair["ratio"] == pair["predicted_seconds"] / pair["median_seconds"]
    assert found.num_foretold == 2
    assert found.num_within_goal == sum(abs(pair["ratio"] - 1) <= 0.15 for pair in foretold)


def test_command_line(
    model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {n} of a text" for n in range(60)))
    shape = ["--window-tokens", "30", "--prompt-tokens", "4", "--max-windows", "2"]
    for path in model:
        output = tmp_path / f"{path.name}.safetensors"
        arguments = ["trace", str(path), "--task", str(text), "-o", str(output), *shape]
        assert run(arguments) == 0
        assert "60 tokens in 2 sequences" in " ".join(capsys.readouterr().err.split())
        trace = Trace.load(output)
        assert trace.step_tokens.tolist() == ([4] + [1] * 26) * 2
        assert trace.info.has_weights == (path == model[0])
    simulated = ["simulate", str(output), str(model[1]), "--device", "laptop-16gb", "--ctx", "64"]
    assert run([*simulated, "--slots", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["sizes"][0]
    header = GgufModel(model[1])
    table = header.spec.vocab_size * header.spec.hidden_size * 4
    read = header.dense_bytes - (0 if header.spec.tie_word_embeddings else table)
    rate = load_device("laptop-16gb").memory_bytes_per_second
    assert found["limit"]["dense_seconds"] == pytest.approx(read / rate)
    assert found["limit"]["storage_seconds"] > 0 == found["limit"]["link_seconds"]
    assert run([*simulated, "--budget", "1GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["sizes"][0]
    assert found["share_of_experts"] == 1 and found["splits"] and not found["is_below_cycle"]
    assert run([*simulated, "--budget", "1MB"]) == 3
    assert "too small even when experts are paged" in " ".join(capsys.readouterr().err.split())
    assert run(["simulate", str(output), str(model[0]), "--slots", "4"]) == 2
    assert "recorded with another model" in " ".join(capsys.readouterr().err.split())
    assert run([*simulated, "--slots", "4", "--predictors", "--json"]) == 0
    (line,) = json.loads(capsys.readouterr().out)["sizes"][0]["not_scored"]
    assert line.startswith("linear map: llama.cpp runs this file") and "fit-guesses" not in line
    assert run([*arguments, "--prompt-tokens", "0"]) == 2
    assert "--prompt-tokens is 0" in " ".join(capsys.readouterr().err.split())
    prompt = ["--prompt", "def f(", "--raw", "--max-new-tokens", "5", "--ctx", "64", "--json"]
    output = tmp_path / "run.safetensors"
    assert run(["run", str(model[1]), *prompt, "--trace", str(output)]) == 0
    assert Trace.load(output).num_tokens == len("def f(") + 4
