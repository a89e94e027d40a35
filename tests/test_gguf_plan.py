"""Planning from a GGUF file: layers stay as they are stored, or become smaller."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from fake_stats import fake_stats
from gguf_files import write_moe

from edge_moe.budget import non_expert_bytes
from edge_moe.candidates import GGUF_MIXES
from edge_moe.cli import run
from edge_moe.converters.build import GGUF_NAME, build
from edge_moe.errors import BudgetError, StatsError, TargetError
from edge_moe.formats import DROP, expert_bytes
from edge_moe.gguf_model import GgufModel
from edge_moe.offer import find_offer, gguf_forms, stored_forms
from edge_moe.optimise import solve
from edge_moe.plan import Plan
from edge_moe.plan_remarks import UNSEARCHED
from edge_moe.planner import gather_evidence, make_plan
from edge_moe.report.data import load_report
from edge_moe.stats import ExpertStats

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp", reason="needs libggml")

MIXED = {0: ("Q4_K", "Q4_K", "Q6_K"), 1: ("Q6_K",) * 3, 2: ("Q5_0", "Q5_0", "Q5_1")}
STORED = ("q4_k/q4_k/q6_k", "q6_k", "q5_0/q5_0/q5_1")


@pytest.fixture
def model(tmp_path: Path) -> GgufModel:
    return GgufModel(write_moe(tmp_path / "m.gguf", layer_types=MIXED, num_layers=3))


def _plan(model: GgufModel, stats: ExpertStats, budget_bytes: int, **options: object) -> Plan:
    arguments: dict[str, object] = {"model": str(model.path), "target": "gguf"}
    return make_plan(
        model,
        stats,
        budget_bytes,
        runtime=(0, "assumed"),
        **(arguments | options),  # type: ignore[arg-type]
    )


def _whole_bytes(model: GgufModel) -> int:
    return sum(4 * model.expert_bytes(layer) for layer in model.spec.moe_layer_ids)


def _fixed_bytes(model: GgufModel) -> int:
    return non_expert_bytes(_plan(model, fake_stats(model), 10**10).terms)


def test_what_is_offered(model: GgufModel) -> None:
    assert stored_forms(model) == STORED
    singles = (DROP, "tq1_0", "q2_k", "q3_k", "q4_k", "q5_k")
    every = gguf_forms(model)
    assert tuple(form for form in every if form not in GGUF_MIXES) == singles
    assert {form for form in every if form in GGUF_MIXES} == set(GGUF_MIXES)
    sizes = [expert_bytes(form, 256, 256) for form in every]
    assert sizes == sorted(sizes)
    offer = find_offer(model, (DROP, "q2_k", "q4_k", "q5_k"), "gguf", "cpu")
    assert offer.forms == (DROP, "q2_k", "q4_k", STORED[0], "q5_k", STORED[2], "q6_k")
    allowed = {
        layer: [form for form, ok in zip(offer.forms, row, strict=True) if ok]
        for layer, row in enumerate(offer.allowed)
    }
    assert allowed == {
        0: [DROP, "q2_k", "q4_k", STORED[0]],
        1: [DROP, "q2_k", "q4_k", "q5_k", "q6_k"],
        2: [DROP, "q2_k", "q4_k", "q5_k", STORED[2]],
    }
    assert "q3_k was not measured in this calibration: not offered." in offer.limits
    assert not any(sentence.startswith("q6_k was not") for sentence in offer.limits)


def test_a_stored_form_that_was_not_measured_is_for_its_own_layers(tmp_path: Path) -> None:
    types = {0: ("Q4_K",) * 3, 1: ("Q8_0",) * 3}
    model = GgufModel(write_moe(tmp_path / "m.gguf", layer_types=types))
    offer = find_offer(model, (DROP, "q2_k"), "gguf", "cpu")
    assert offer.forms == (DROP, "q2_k", "q4_k", "q8_0")
    assert offer.allowed.tolist() == [[True, True, True, False], [True, True, False, True]]


def test_a_budget_for_all_keeps_all(model: GgufModel) -> None:
    plan = _plan(model, fake_stats(model), 10**10)
    assert plan.forms == [[form] * 4 for form in STORED]
    assert plan.loss == 0.0 and UNSEARCHED in plan.warnings
    assert plan.term("experts").num_bytes == _whole_bytes(model)
    assert plan.term("dense weights").num_bytes == model.dense_bytes
    assert plan.model_type == "gguf:qwen3moe"
    assert max(point.expert_bytes for point in plan.frontier) == _whole_bytes(model)


@pytest.mark.parametrize("share", [0.35, 0.5, 0.8, 0.95])
def test_plans_are_the_best_there_are(share: float, tmp_path: Path) -> None:
    """Against every choice of a count and a form per layer."""
    types = {0: MIXED[0], 1: MIXED[1]}
    model = GgufModel(write_moe(tmp_path / "m.gguf", layer_types=types))
    stats = fake_stats(model, (DROP, "q2_k", "q3_k", "q4_k"))
    offer = find_offer(model, stats.info.forms, "gguf", "cpu")
    budget = int(share * _whole_bytes(model))
    evidence = gather_evidence(model.spec, stats, offer.forms, "gguf", budget, offer=offer)
    problem = evidence.problem
    best = np.inf
    layers = range(2)
    for count in range(2, 5):
        options = []
        for layer in layers:
            choices = []
            for form in range(1, len(offer.forms)):
                for kept in itertools.combinations(range(4), count):
                    choice = np.array([form if e in kept else 0 for e in range(4)])
                    if not problem.allowed[layer, range(4), choice].all():
                        continue
                    loss = problem.loss[layer, range(4), choice].sum()
                    choices.append((problem.form_bytes[choice].sum(), loss))
            options.append(choices)
        for one, two in itertools.product(*options):
            if one[0] + two[0] <= budget:
                best = min(best, one[1] + two[1])
    assert solve(problem).loss == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_plan_is_built_at_its_bytes(share: float, model: GgufModel, tmp_path: Path) -> None:
    budget = _fixed_bytes(model) + int(share * _whole_bytes(model))
    plan = _plan(model, fake_stats(model), budget)
    assert plan.total_bytes <= budget
    counts = {len(plan.kept(row)) for row in plan.forms}
    assert len(counts) == 1
    reloaded_path = tmp_path / "plan.json"
    plan.save(reloaded_path)
    found = GgufModel(build(Plan.load(reloaded_path), tmp_path / "out") / GGUF_NAME)
    num_kept = found.spec.num_experts
    built = sum(found.expert_bytes(layer) * num_kept for layer in found.spec.moe_layer_ids)
    assert built == plan.term("experts").num_bytes
    assert found.dense_bytes <= plan.term("dense weights").num_bytes
    for form, row in zip(stored_forms(found), plan.forms, strict=True):
        assert {form} == {each for each in row if each != DROP}
    data = load_report(tmp_path / "out")
    assert data.full_expert_bytes == _whole_bytes(model)
    assert sum(step.num_bytes for step in data.waterfall()[:3]) == built


def test_rivals_obey_the_same_rules(model: GgufModel) -> None:
    budget = _fixed_bytes(model) + int(0.7 * _whole_bytes(model))
    plan = _plan(model, fake_stats(model), budget)
    rivals = {rival.name: rival for rival in plan.rivals}
    assert {"prune only", "quantise only", "random retention"} <= set(rivals)
    for name in ("prune only", "random retention"):
        for own, row in zip(STORED, rivals[name].forms, strict=True):
            assert set(row) <= {own, DROP}
    for rival in rivals.values():
        sizes = [expert_bytes(form, 256, 256) for row in rival.forms for form in row]
        assert sum(sizes) == rival.expert_bytes <= plan.term("experts").num_bytes
        assert rival.loss >= plan.loss - 1e-12


def test_composites_of_equal_size_tie(tmp_path: Path) -> None:
    types = {0: ("Q4_K", "Q4_K", "Q6_K"), 1: ("Q6_K", "Q4_K", "Q4_K")}
    model = GgufModel(write_moe(tmp_path / "m.gguf", layer_types=types))
    plan = _plan(model, fake_stats(model), 10**10)
    assert [row[0] for row in plan.forms] == ["q4_k/q4_k/q6_k", "q6_k/q4_k/q4_k"]
    budget = _fixed_bytes(model) + int(0.6 * _whole_bytes(model))
    smaller = _plan(model, fake_stats(model), budget)
    assert smaller.loss > 0 and "q6_k/q4_k/q4_k" not in smaller.forms[0]


def test_a_super_expert_below_four_bits_stays_as_it_is(tmp_path: Path) -> None:
    model = GgufModel(write_moe(tmp_path / "m.gguf", types=("Q2_K",) * 3))
    stats = fake_stats(model)
    stats.max_output[:] = 1.0
    stats.max_output[0, 0] = 1e6
    budget = _fixed_bytes(model) + int(0.6 * _whole_bytes(model))
    plan = _plan(model, stats, budget)
    assert plan.super_experts == [(0, 0)]
    assert plan.forms[0][0] == "q2_k" and {f for row in plan.forms for f in row} == {DROP, "q2_k"}


def test_refusals(model: GgufModel, tmp_path: Path) -> None:
    stats = fake_stats(model)
    with pytest.raises(TargetError, match="can only be built as GGUF, not as native"):
        _plan(model, stats, 10**10, target="native")
    with pytest.raises(BudgetError, match="is too small"):
        _plan(model, stats, _fixed_bytes(model))
    other = GgufModel(write_moe(tmp_path / "other.gguf", layer_types=MIXED, num_layers=3, seed=9))
    with pytest.raises(StatsError, match="measured on another model"):
        _plan(other, stats, 10**10)
    with pytest.raises(StatsError, match="calibrate again"):
        _plan(model, fake_stats(model, ("q2_k", "q4_k")), 10**10)


def test_the_commands(model: GgufModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_stats(model).save(tmp_path / "stats")
    budget = _fixed_bytes(model) + int(0.6 * _whole_bytes(model))
    command = ["plan", str(model.path), "--stats", str(tmp_path / "stats"), "--budget"]
    command += [f"{budget}B", "-o", str(tmp_path / "plan.json"), "--no-search"]
    assert run(command) == 0, capsys.readouterr()
    shown = " ".join(capsys.readouterr().out.split())
    assert "target gguf" in shown and "not measured on held-out text" in shown
    assert run(["build", str(tmp_path / "plan.json"), "-o", str(tmp_path / "out")]) == 0
    assert "model.gguf" in capsys.readouterr().err
    assert run(["inspect", str(tmp_path / "out" / GGUF_NAME), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 2 <= found["num_experts"] <= 4
    assert run([*command, "--target", "hf"]) == 2
    assert "can only be built as GGUF" in capsys.readouterr().err
