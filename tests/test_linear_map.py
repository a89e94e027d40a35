"""A linear map from a block's input to the next router: fitted, kept in a file, asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILY_NAMES, TinyCheckpoint
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from tiny_models import make_tiny_checkpoint

from edge_moe.checkpoint import Checkpoint
from edge_moe.cli import run
from edge_moe.errors import InputError
from edge_moe.runtime.fit_linear import Moments, fit_linear, moment_bytes, ranked_by
from edge_moe.runtime.linear_map import LinearGuess, LinearMap, LinearMapInfo
from edge_moe.runtime.session import Session
from edge_moe.runtime.trace import Trace

RANDOM = np.random.default_rng(0)
WINDOWS = [RANDOM.integers(1, 250, 60).tolist() for _ in range(6)]
INFO = LinearMapInfo(
    model_fingerprint="m",
    hidden_size=2,
    kept=((0, 1), (3, 5, 7)),
    tasks=("code",),
    num_tokens=9,
    ridge=0.01,
    explained=(0.5,),
)
SMALL = LinearMap(
    INFO,
    [np.array([[1, 0], [0, 1], [-1, -1]], np.float32)],
    [np.array([0, 0, 2.5], np.float32)],
)


def test_moments_are_those_of_least_squares() -> None:
    inputs = RANDOM.normal(1, 1, (200, 5)).astype(np.float32)
    truth, offset = RANDOM.normal(0, 1, (3, 5)), np.array([1.0, -2.0, 3.0])
    scores = (inputs @ truth.T + offset).astype(np.float32)
    moments = Moments(5, 3)
    for start in range(0, 200, 50):
        moments.add(inputs[start : start + 50], scores[start : start + 50])
    found, constant, explained = moments.solve(0.0)
    np.testing.assert_allclose(found, truth, atol=1e-4)
    np.testing.assert_allclose(constant, offset, atol=1e-4)
    assert explained == pytest.approx(1, abs=1e-5)
    # ridge regression is least squares with rows of sqrt(r) I and zeros below the centred data
    centred, wanted = inputs - inputs.mean(axis=0), scores - scores.mean(axis=0)
    weight = 0.5 * np.trace(centred.T @ centred) / 5
    rows = np.concatenate([centred, np.sqrt(weight) * np.eye(5)])
    expected = np.linalg.lstsq(rows, np.concatenate([wanted, np.zeros((5, 3))]), rcond=None)[0]
    found, constant, explained = moments.solve(0.5)
    np.testing.assert_allclose(found, expected.T, atol=1e-4)
    residual = np.square(wanted - centred @ expected).sum()
    assert explained == pytest.approx(1 - residual / np.square(wanted).sum(), abs=1e-4)


def test_guesses_by_hand() -> None:
    states = [np.array([2, 1], np.float32)]
    guess = LinearGuess(lambda: states[0], SMALL, 2)
    assert guess.guess(0, []) == [0, 1]  # 2, 1, -0.5
    states[0] = np.array([0, 1], np.float32)
    assert guess.guess(0, []) == [2, 1]  # 0, 1, 1.5
    fewer = LinearGuess(lambda: states[0], SMALL.for_experts([[0], [7, 3]]), 2)
    assert fewer.guess(0, []) == [0, 1]  # experts 7 and 3
    with pytest.raises(InputError, match="knows nothing of expert 4 in MoE layer 1"):
        SMALL.for_experts([[0], [3, 4]])
    assert LinearGuess(lambda: None, SMALL, 2).guess(0, []) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"map.1": np.zeros((3, 3), np.float32)}, "is damaged: float32"),
        ({"map.1": np.zeros((3, 2), np.float64)}, "is damaged: float64"),
        ({"offset.1": np.full(3, np.inf, np.float32)}, "a value is no number"),
        ({"map.2": np.zeros((3, 2), np.float32)}, "its layers are not complete; fit it again"),
    ],
)
def test_damaged_maps(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "map.safetensors"
    SMALL.save(path)
    read = LinearMap.load(path)
    assert read.info == INFO and read.num_bytes == 4 * (6 + 3)
    np.testing.assert_array_equal(read.maps[0], SMALL.maps[0])
    metadata = {"edge_moe_linear_map": INFO.model_dump_json()}
    save_file(load_file(path) | change, path, metadata=metadata)
    with pytest.raises(InputError, match=message):
        LinearMap.load(path)
    for text, words in (("{}", "has version None"), ('{"version": 1}', "header of .* is damaged")):
        save_file(load_file(path), path, metadata={"edge_moe_linear_map": text})
        with pytest.raises(InputError, match=words):
            LinearMap.load(path)
    sixteen = {"map.1": torch.zeros(3, 2, dtype=torch.bfloat16), "offset.1": torch.zeros(3)}
    save_torch(sixteen, path, metadata=metadata)  # whether numpy can read it depends on ml_dtypes
    with pytest.raises(InputError, match="(is not readable|is damaged).*bfloat16.*fit it again"):
        LinearMap.load(path)
    SMALL.save(path)
    save_file(load_file(path), path)
    with pytest.raises(InputError, match="is no linear map"):
        LinearMap.load(path)
    with pytest.raises(InputError, match="is not readable"):
        LinearMap.load(tmp_path / "none")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_is_fitted(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(family)
    spec = Checkpoint(folder).spec
    with Session.open(folder) as session:
        if spec.latent_width:
            with pytest.raises(InputError, match="have an input of their own"):
                fit_linear(session, WINDOWS, ["text"])
            return
        found = fit_linear(session, WINDOWS, ["text"])
        # what the map was fitted to is what the router goes by
        block, hidden = session.blocks[1], torch.randn(40, spec.hidden_size)
        hidden = hidden.to(session.model.dtype)
        with torch.inference_mode():
            scores = ranked_by(block, block.logits(hidden), spec)
            chosen = block.choose(hidden)[0].sort(dim=1).values
        if spec.router.num_groups == 1 and spec.router.score_function != "sparsemixer":
            best = scores.float().topk(spec.top_k).indices.sort(dim=1).values
            assert (best == chosen).float().mean() > 0.9
    assert [matrix.shape for matrix in found.maps] == [(spec.num_experts, spec.hidden_size)] * (
        spec.num_moe_layers - 1
    )
    assert all(0 < share <= 1 for share in found.info.explained)


def test_passes_over_the_text_change_nothing(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, "qwen3_moe", num_hidden_layers=4)
    with Session.open(folder) as session:
        spec = session.spec
        one = moment_bytes(spec.hidden_size, spec.num_experts)
        whole, calls = fit_linear(session, WINDOWS, ["text"]), [0]

        def advance() -> None:
            calls[0] += 1

        piecewise = fit_linear(session, WINDOWS, ["text"], limit_bytes=2 * one, advance=advance)
        assert calls[0] == 2 * len(WINDOWS)
        for left, right in zip(whole.maps, piecewise.maps, strict=True):
            np.testing.assert_allclose(left, right, atol=1e-5)
        with pytest.raises(InputError, match="the sums of one layer take"):
            fit_linear(session, WINDOWS, ["text"], limit_bytes=one - 1)
        with pytest.raises(InputError, match="needs text"):
            fit_linear(session, [], ["text"])


def right_guesses(trace: Trace, name: str) -> float:
    """Share of the second layer's choices that the first top_k guesses name."""
    single = np.repeat(trace.step_tokens, trace.step_tokens) == 1
    guessed, chosen = trace.guesses[name][single][:, 1], trace.rows[single][:, 1]
    found = guessed[:, : trace.info.top_k, None] == chosen[:, None]
    return float(found.any(axis=1).mean())


def test_command_line(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, text, fitted = tiny_checkpoint("qwen3_moe"), tmp_path / "t.txt", tmp_path / "m"
    fitted = fitted.with_suffix(".safetensors")
    text.write_text("\n".join(f"line {n} of a text" for n in range(300)))
    shape = ["--window-tokens", "40", "--max-windows", "12"]
    assert run(["fit-guesses", str(folder), "--task", str(text), "-o", str(fitted), *shape]) == 0
    assert "fitted on 480 tokens" in " ".join(capsys.readouterr().err.split())
    trace = tmp_path / "trace.safetensors"
    recorded = ["trace", str(folder), "--task", str(text), "-o", str(trace), *shape]
    assert run([*recorded, "--linear-map", str(fitted)]) == 0
    # a short text over and over: the map knows better than the next router
    assert right_guesses(Trace.load(trace), "linear") > 0.65
    assert right_guesses(Trace.load(trace), "linear") > right_guesses(Trace.load(trace), "router")
    capsys.readouterr()
    simulated = ["simulate", str(trace), str(folder), "--slots", "4", "--predictors", "--json"]
    assert run(simulated) == 0
    size = json.loads(capsys.readouterr().out)["sizes"][0]
    scores = {each["predictor"]: each["recall"] for each in size["predictors"]}
    assert size["not_scored"] == [] and scores["linear map 4"] > scores["linear map 2"] > 0
    asked = ["run", str(folder), "--prompt", "line", "--raw", "--max-new-tokens", "8", "--json"]
    paged = [*asked, "--slots", "4"]
    assert run([*paged, "--no-prefetch"]) == 0
    expected = json.loads(capsys.readouterr().out)
    linear = ["--linear-map", str(fitted), "--predictor", "linear", "--prefetch"]
    assert run([*paged, *linear]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == expected["text"] and found["paging"]["predicted_misses"] > 0
    num_bytes = LinearMap.load(fitted).num_bytes
    assert {"linear map": num_bytes}.items() <= {
        term["name"]: term["num_bytes"] for term in found["terms"]
    }.items()
    assert run([*paged, "--predictor", "linear"]) == 2
    assert "the predictor linear needs a map" in " ".join(capsys.readouterr().err.split())
    other = tiny_checkpoint("olmoe")
    assert run(["run", str(other), *asked[2:], "--slots", "4", *linear]) == 2
    assert "was fitted for another model" in " ".join(capsys.readouterr().err.split())


def test_a_map_of_another_shape_is_refused() -> None:
    SMALL.require_model("m", 2, 2)
    with pytest.raises(InputError, match="is for 2 MoE layers of width 2, the model has 3"):
        SMALL.require_model("m", 2, 3)
