"""GPTQ through the whole path: losses, plans, builds and the search pack the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILY_NAMES, TinyCheckpoint, make_tiny_checkpoint
from hand_plan import hand_plan, random_forms
from peak_memory import measure_peak, needs_proc

from edge_moe import metrics
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.calibrate import calibrate, text_packer
from edge_moe.converters.calibrate_gradients import calibrate_with_gradients
from edge_moe.converters.calibration_memory import packing_terms
from edge_moe.converters.layer_stream import LayerStream
from edge_moe.converters.observe import OBSERVE, BlockObserver, router_scores_of
from edge_moe.converters.packing import packing_peak_bytes
from edge_moe.converters.variants import PackedExperts, VariantScorer
from edge_moe.errors import InputError
from edge_moe.moments import load_moments
from edge_moe.plan import Plan
from edge_moe.runtime.session import Session
from edge_moe.stats import ExpertStats

TEXT = "def add(a, b):\n    return a + b\n\nIt was a fine evening, and 12 + 7 = 19.\n" * 40
FORMS = ("q4_0", "q8_0")
WINDOW_TOKENS = 128


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "mine.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def measured(folder: Path, task: Path, output: Path, quantiser: str | None) -> ExpertStats:
    options = {"window_tokens": WINDOW_TOKENS, "forms": FORMS, "quantiser": quantiser}
    return calibrate(folder, [str(task)], output, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_gptq_loses_less_than_nearest_and_is_the_default(
    family: str, tiny_checkpoint: TinyCheckpoint, task: Path, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(family)
    best = measured(folder, task, tmp_path / "best", None)
    nearest = measured(folder, task, tmp_path / "nearest", "nearest")
    assert best.info.quantiser == "gptq_refit" and nearest.info.quantiser == "nearest"
    often = best.routed_tokens >= 100
    for form in FORMS:
        ratio = best.form_loss.values()[often, best.form_index(form)]
        ratio /= nearest.form_loss.values()[often, nearest.form_index(form)]
        assert np.median(ratio) < 0.9, form
    np.testing.assert_array_equal(
        best.form_loss.values()[..., 0], nearest.form_loss.values()[..., 0]
    )


@pytest.mark.parametrize("quantiser", ["gptq_refit", "gptq_refit_all"])
def test_builds_and_the_search_pack_what_was_measured(
    quantiser: str, tiny_checkpoint: TinyCheckpoint, task: Path, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("olmoe")
    checkpoint = Checkpoint(folder)
    info = measured(folder, task, tmp_path / "stats", quantiser).info
    forms = random_forms(checkpoint, ("q4_0", "drop"))
    plan = hand_plan(checkpoint, forms).model_copy(
        update={"calibration": info.options, "data_fingerprint": info.data_fingerprint}
    )
    output = build(plan, tmp_path / "out")
    again = build(plan, tmp_path / "again")
    for path in output.glob("experts-*"):
        assert path.read_bytes() == (again / path.name).read_bytes()
    plain = build(hand_plan(checkpoint, forms), tmp_path / "plain")
    assert (output / "experts-00001.safetensors").read_bytes() != (
        plain / "experts-00001.safetensors"
    ).read_bytes()
    window = list(range(3, 60))
    packer = text_packer(checkpoint, info.options, info.data_fingerprint)
    scores = VariantScorer(checkpoint, [window], PackedExperts(checkpoint, packer)).score(
        {"plan": forms}
    )["plan"]
    with (
        Session.open(folder, context_tokens=64) as base,
        Session.open(output, context_tokens=64, kernels="exact") as built,
    ):
        found = metrics.compare_tokens(built.logits(window), base.logits(window), window)
    np.testing.assert_allclose(scores.kld, found.kld, atol=1e-5)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_token_through_every_expert(
    family: str, tiny_checkpoint: TinyCheckpoint, task: Path, tmp_path: Path
) -> None:
    """Packing changes; what routed tokens say of experts does not, nor what flows on."""
    folder = tiny_checkpoint(family)
    every = measured(folder, task, tmp_path / "every", "gptq_refit_all")
    routed = measured(folder, task, tmp_path / "routed", "gptq_refit")
    found, expected = every.to_arrays(), routed.to_arrays()
    losses = found.pop("form_loss"), expected.pop("form_loss")
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert (losses[0] != losses[1]).any()
    options: dict[str, Any] = {"window_tokens": WINDOW_TOKENS, "forms": FORMS}
    both = calibrate_with_gradients(
        *(folder, [str(task)], tmp_path / "both"), quantiser="gptq_refit_all", **options
    )
    np.testing.assert_array_equal(both.to_arrays()["form_loss"], losses[0])
    for layer_id in every.info.moe_layer_ids:
        one, two = (
            load_moments(tmp_path / name, layer_id, Checkpoint(folder).spec)
            for name in ("every", "routed")
        )
        np.testing.assert_array_equal(one.input_squares.values(), two.input_squares.values())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_router_scores_are_those_that_gates_are_made_of(
    family: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    """In every token, the chosen experts' gates are one multiple of their scores."""
    checkpoint = Checkpoint(tiny_checkpoint(family))
    stream = LayerStream(checkpoint, OBSERVE)
    layer_id = checkpoint.spec.moe_layer_ids[0]
    with torch.inference_mode():
        hidden = stream.embed(list(range(3, 60)))
        for before in range(layer_id):
            with stream.loaded(before):
                hidden = stream.run(before, hidden)
        with stream.loaded(layer_id):
            block = stream.moe_block(layer_id)
            with BlockObserver(block, checkpoint.spec) as observer:
                seen = observer.take(stream.run(layer_id, hidden))
            scores = router_scores_of(block, seen.inputs, checkpoint.spec)
    assert scores.shape == (57, 8) and (scores > 0).all()
    ratios = seen.gates / scores.gather(1, seen.expert_ids)
    torch.testing.assert_close(ratios[:, 0], ratios[:, 1], rtol=1e-5, atol=0)


def test_layers_may_come_in_any_order(
    tiny_checkpoint: TinyCheckpoint, task: Path, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("mixtral")
    info = measured(folder, task, tmp_path / "stats", None).info
    packers = [
        text_packer(Checkpoint(folder), info.options, info.data_fingerprint) for _ in range(2)
    ]
    forwards = [packers[0].pack(layer, 2, "q4_0") for layer in (0, 1)]
    backwards = [packers[1].pack(layer, 2, "q4_0") for layer in (1, 0)]
    for left, right in zip(forwards, reversed(backwards), strict=True):
        np.testing.assert_array_equal(left, right)


def test_what_cannot_be_packed_again_is_refused(
    tiny_checkpoint: TinyCheckpoint, task: Path, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("olmoe")
    with pytest.raises(InputError, match="needs the whole text at once, not shard 0/2"):
        calibrate(folder, [str(task)], tmp_path / "s", shard=(0, 2), quantiser="gptq")
    with pytest.raises(InputError, match="quantiser 'best' is unknown"):
        calibrate(folder, [str(task)], tmp_path / "s", quantiser="best")
    moved = tmp_path / "moved.txt"
    moved.write_text(TEXT, encoding="utf-8")
    info = measured(folder, moved, tmp_path / "stats", None).info
    plan: Plan = hand_plan(Checkpoint(folder), [["q4_0"] * 8] * 2).model_copy(
        update={"calibration": info.options, "data_fingerprint": info.data_fingerprint}
    )
    moved.write_text("more " + TEXT, encoding="utf-8")
    with pytest.raises(InputError, match="has changed since it was calibrated on"):
        build(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


IMPORTS = """
import sys
from pathlib import Path
from edge_moe.converters.build import build
from edge_moe.converters.calibrate import text_packer
from edge_moe.plan import Plan
"""
BUILT = """
build(Plan.load(Path(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.slow
@needs_proc
def test_a_build_states_the_memory_of_its_text(task: Path, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(
        tmp_path / "model", "olmoe", width=256, num_hidden_layers=3, num_experts=4
    )
    checkpoint = Checkpoint(folder)
    stats = measured(folder, task, tmp_path / "stats", None)
    plan = hand_plan(checkpoint, random_forms(checkpoint, ("drop", "q8_0", "q4_0")))
    found = {
        "calibration": stats.info.options,
        "data_fingerprint": stats.info.data_fingerprint,
    }
    plan.model_copy(update=found).save(tmp_path / "plan.json")
    peak = measure_peak(IMPORTS, BUILT, tmp_path / "plan.json", tmp_path / "out")
    terms = packing_terms(checkpoint, stats.info.num_tokens, WINDOW_TOKENS, "gptq_refit")
    stated_bytes = sum(term.num_bytes for term in terms)
    assert peak.grown_bytes <= stated_bytes + packing_peak_bytes(checkpoint.spec)
    text = " ".join(peak.stderr.split())
    assert "packing by gptq_refit, which runs the calibration text again; memory at most" in text
