"""From checkpoint and statistics to a plan: every target's rules, minimum, rivals, warnings."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FAMILY_NAMES, TinyCheckpoint, make_tiny_checkpoint
from fake_stats import fake_stats

from edge_moe.candidates import candidate_forms
from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import BudgetError, StatsError, TargetError
from edge_moe.formats import DROP, FORM_NAMES, expert_bytes, get_form
from edge_moe.loss_table import DropLoss, LossKind
from edge_moe.plan import Plan, Target
from edge_moe.planner import make_plan
from edge_moe.stats import ExpertStats
from edge_moe.units import round_up_bytes

RUNTIME = (10_000_000, "assumed")
TARGETS: tuple[Target, ...] = ("native", "gguf", "hf", "onnx")


def plan_for(
    checkpoint: Checkpoint, budget_bytes: int, target: Target = "native", **changes: Any
) -> Plan:
    arguments: dict[str, Any] = {
        "stats": changes.get("stats") or fake_stats(checkpoint),
        "context_tokens": 128,
        "runtime": RUNTIME,
        "model": "m",
    }
    return make_plan(checkpoint, budget_bytes=budget_bytes, target=target, **(arguments | changes))


def minimum_bytes(checkpoint: Checkpoint, target: Target = "native", **changes: Any) -> int:
    with pytest.raises(BudgetError) as caught:
        plan_for(checkpoint, 1, target, **changes)
    return caught.value.minimum_bytes


def half_of_the_experts(checkpoint: Checkpoint, target: Target = "native") -> int:
    """A budget half way between the smallest and everything whole."""
    whole = plan_for(checkpoint, 10**12, target)
    return (minimum_bytes(checkpoint, target) + whole.total_bytes) // 2


@pytest.fixture(scope="module")
def qwen3(tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    return Checkpoint(tiny_checkpoint("qwen3_moe", wide=True))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_is_planned_within_its_budget(
    tiny_checkpoint: TinyCheckpoint, family: str, wide: bool
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint(family, wide))
    budget_bytes = half_of_the_experts(checkpoint)
    plan = plan_for(checkpoint, budget_bytes)
    assert plan.total_bytes <= budget_bytes
    spec = checkpoint.spec
    widths = spec.expert_shape
    stored = sum(expert_bytes(form, *widths) for row in plan.forms for form in row)
    assert plan.term("experts").num_bytes == stored
    assert plan.form_bytes["bf16"] == spec.expert_weights * 2
    assert plan.form_bytes[DROP] == 0
    size = spec.num_experts // spec.router.num_groups
    for row in plan.forms:
        kept = np.array([form != DROP for form in row]).reshape(-1, size).sum(axis=1)
        assert len(set(kept.tolist())) == 1
        assert kept[0] * spec.router.top_groups >= spec.top_k


def test_a_plan_is_the_same_every_time(qwen3: Checkpoint) -> None:
    budget_bytes = half_of_the_experts(qwen3)
    assert plan_for(qwen3, budget_bytes) == plan_for(qwen3, budget_bytes)


@pytest.mark.parametrize("target", TARGETS)
def test_the_stated_minimum_works_and_one_byte_less_does_not(
    qwen3: Checkpoint, target: Target
) -> None:
    smallest = minimum_bytes(qwen3, target)
    plan = plan_for(qwen3, smallest, target)
    assert plan.total_bytes == smallest
    assert {len(plan.kept(row)) for row in plan.forms} == {2}
    with pytest.raises(BudgetError) as caught:
        plan_for(qwen3, smallest - 1, target)
    assert caught.value.minimum_bytes == smallest
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert f"smallest that works is {round_up_bytes(smallest)} (" in message
    assert "dense weights" in message and "\n" not in message
    assert ("edge-moe run" in message) == (target == "native")


@pytest.mark.parametrize("target", TARGETS)
def test_a_budget_above_everything_keeps_everything_whole(
    qwen3: Checkpoint, target: Target
) -> None:
    plan = plan_for(qwen3, 10**12, target)
    widest = "f32" if target == "onnx" else "bf16"
    assert {form for row in plan.forms for form in row} == {widest}
    assert plan.loss == 0.0
    assert plan.frontier[-1].loss == 0.0


@pytest.mark.parametrize("target", ["gguf", "hf"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
def test_uniform_targets_keep_one_count_and_share_forms(
    qwen3: Checkpoint, target: Target, share: float
) -> None:
    smallest = minimum_bytes(qwen3, target)
    whole = plan_for(qwen3, 10**12, target).total_bytes
    plan = plan_for(qwen3, int(smallest + share * (whole - smallest)), target)
    assert len({len(plan.kept(row)) for row in plan.forms}) == 1
    used = [{form for form in row if form != DROP} for row in plan.forms]
    assert all(len(forms) == 1 for forms in used)
    if target != "gguf":
        assert len(set.union(*used)) == 1
    if target == "hf":
        assert set.union(*used) == {"bf16"}
    for rival in plan.rivals:
        assert len({len(Plan.kept(row)) for row in rival.forms}) == 1
    assert any("same number" in line for line in plan.limits)


def test_native_is_never_worse_than_a_constrained_target(qwen3: Checkpoint) -> None:
    native = plan_for(qwen3, half_of_the_experts(qwen3))
    spare = native.total_bytes - native.term("experts").num_bytes
    for target in ("gguf", "onnx"):
        fixed = plan_for(qwen3, 10**12, target)
        fixed_bytes = fixed.total_bytes - fixed.term("experts").num_bytes
        same_experts = fixed_bytes + native.budget_bytes - spare
        assert plan_for(qwen3, same_experts, target).loss >= native.loss


def test_onnx_plans_mix_widths_and_counts(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe"))
    forms = candidate_forms(checkpoint.spec, "onnx")
    stats = fake_stats(checkpoint, forms)
    plan = plan_for(checkpoint, 10**12, "onnx", stats=stats)
    experts = plan.term("experts").num_bytes
    plan = plan_for(checkpoint, plan.total_bytes - experts * 7 // 8, "onnx", stats=stats)
    used = {form for row in plan.forms for form in row}
    assert used <= set(forms) and len(used - {DROP}) > 1
    assert any(len(set(row) - {DROP}) > 1 for row in plan.forms)


def test_gguf_is_refused_early_where_it_cannot_work(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(TargetError, match="phimoe weighs experts by a softmax"):
        plan_for(Checkpoint(tiny_checkpoint("phimoe")), 10**12, "gguf")


def test_a_super_expert_keeps_at_least_4_bits(qwen3: Checkpoint) -> None:
    plan = plan_for(qwen3, minimum_bytes(qwen3))
    assert plan.super_experts == [(0, 0)]
    assert get_form(plan.forms[0][0]).bits_per_weight >= 4
    assert {form for form in plan.forms[0][1:] if form != DROP} == {"tq1_0"}
    shared = plan_for(qwen3, minimum_bytes(qwen3, "gguf"), "gguf")
    assert {form for form in shared.forms[0] if form != DROP} == {"q4_k"}
    assert {form for form in shared.forms[1] if form != DROP} == {"tq1_0"}
    assert any("layers 0 cannot go below 4 bits" in line for line in shared.limits)


def test_the_frontier_falls_and_holds_the_plan(qwen3: Checkpoint) -> None:
    for target in TARGETS:
        plan = plan_for(qwen3, half_of_the_experts(qwen3, target), target)
        for left, right in pairwise(plan.frontier):
            assert left.expert_bytes < right.expert_bytes
            assert left.loss >= right.loss
        here = [p for p in plan.frontier if p.expert_bytes == plan.term("experts").num_bytes]
        assert [(p.loss, p.total_bytes) for p in here] == [(plan.loss, plan.total_bytes)]
        assert plan.frontier[0].total_bytes == minimum_bytes(qwen3, target)
        assert len(plan.frontier) >= 4


def test_rivals_spend_no_more_and_lose_no_less(qwen3: Checkpoint) -> None:
    plan = plan_for(qwen3, half_of_the_experts(qwen3))
    names = [rival.name for rival in plan.rivals]
    assert names == ["prune only", "quantise only", "one type for all", "random retention"]
    for rival in plan.rivals:
        widths = qwen3.spec.hidden_size, qwen3.spec.expert_width
        stored = sum(expert_bytes(form, *widths) for row in rival.forms for form in row)
        assert rival.expert_bytes == stored <= plan.term("experts").num_bytes
        assert rival.loss >= plan.loss * (1 - 1e-6)
    forms = {rival.name: {f for row in rival.forms for f in row} for rival in plan.rivals}
    assert forms["prune only"] == {DROP, "bf16"}
    assert DROP not in forms["quantise only"]
    assert len(forms["one type for all"]) == 1
    by_name = {rival.name: rival.loss for rival in plan.rivals}
    assert by_name["quantise only"] <= by_name["one type for all"] * (1 + 1e-6)
    assert by_name["prune only"] <= by_name["random retention"]


def test_rivals_that_cannot_exist_are_named(qwen3: Checkpoint) -> None:
    plan = plan_for(qwen3, minimum_bytes(qwen3))
    assert plan.rivals == []
    for name in ("prune only", "quantise only", "one type for all", "random retention"):
        assert any(f"Rival {name!r} does not exist" in line for line in plan.warnings)


def test_random_retention_keeps_protected_experts_and_fills_the_bytes(qwen3: Checkpoint) -> None:
    plan = plan_for(qwen3, half_of_the_experts(qwen3))
    rival = plan.rivals[-1]
    assert rival.forms[0][0] == "bf16"
    whole = expert_bytes("bf16", 256, 256)
    assert plan.term("experts").num_bytes - rival.expert_bytes < whole


def test_experts_that_were_never_chosen_go_first(qwen3: Checkpoint) -> None:
    stats = fake_stats(qwen3)
    unused = stats.form_loss.shape[1] - 1
    for limbs in (stats.form_loss.high, stats.form_loss.low):
        limbs[:, unused] = 0
    stats.routed_tokens[:, unused] = 0
    whole = plan_for(qwen3, 10**12)
    spared = 2 * expert_bytes("bf16", qwen3.spec.hidden_size, qwen3.spec.expert_width)
    plan = plan_for(qwen3, whole.total_bytes - spared, stats=stats)
    smallest = [min(row, key=lambda form: FORM_NAMES.index(form)) for row in plan.forms]
    assert [row[unused] for row in plan.forms] == smallest
    assert plan.routed_share[0][unused] == 0.0
    assert plan.saliency[0][unused] == min(plan.saliency[0])
    assert sum(plan.saliency[0]) == pytest.approx(1.0)


def test_thin_evidence_is_said(qwen3: Checkpoint) -> None:
    stats = fake_stats(qwen3)
    assert plan_for(qwen3, 10**12, stats=stats).warnings == []
    stats.routed_tokens[:, :2] = 31
    warnings = plan_for(qwen3, 10**12, stats=stats).warnings
    assert len(warnings) == 1
    assert "not enough evidence: 4 of 16 experts were chosen by fewer than 32" in warnings[0]


def test_the_context_is_capped_to_the_model(qwen3: Checkpoint) -> None:
    plan = plan_for(qwen3, 10**12, context_tokens=4096)
    assert plan.context_tokens == 512
    assert any("context lowered from 4096 to 512 tokens" in line for line in plan.warnings)
    unasked = plan_for(qwen3, 10**12, context_tokens=None)
    assert unasked.context_tokens == 512
    assert not any("context lowered" in line for line in unasked.warnings)
    shorter = plan_for(qwen3, 10**12, context_tokens=64)
    assert shorter.term("KV cache").num_bytes * 8 == plan.term("KV cache").num_bytes


def test_statistics_of_another_model_are_refused(
    qwen3: Checkpoint, tiny_checkpoint: TinyCheckpoint
) -> None:
    other = fake_stats(Checkpoint(tiny_checkpoint("olmoe", wide=True)))
    with pytest.raises(StatsError, match="measured on another model"):
        plan_for(qwen3, 10**12, stats=other)


def test_forms_that_were_not_measured_are_not_offered(qwen3: Checkpoint) -> None:
    stats = fake_stats(qwen3, forms=("drop", "q4_k"))
    plan = plan_for(qwen3, half_of_the_experts(qwen3), stats=stats)
    assert {form for row in plan.forms for form in row} <= {DROP, "q4_k", "bf16"}
    assert "q8_0 was not measured in this calibration: not offered." in plan.limits
    assert not any("Mixes" in line for line in plan.limits), "no other target has them"
    plan = plan_for(qwen3, 10**12, stats=stats, target="gguf")
    (said,) = [line for line in plan.limits if "Mixes" in line]
    assert "q4_k/q4_k/q6_k for gate/up/down) were not measured" in said
    assert said.endswith("not offered. `edge-moe calibrate --target gguf` measures them.")
    with pytest.raises(StatsError, match="needs drop"):
        plan_for(qwen3, 10**12, stats=fake_stats(qwen3, forms=("q4_k",)))


def test_the_loss_kind_is_selectable_and_named(qwen3: Checkpoint) -> None:
    kind = LossKind(DropLoss.ZERO)
    plan = plan_for(qwen3, half_of_the_experts(qwen3), loss_kind=kind)
    assert plan.loss_unit == kind.unit
    assert plan.loss_unit != plan_for(qwen3, 10**12).loss_unit


def test_shards_merged_give_the_same_plan(qwen3: Checkpoint) -> None:
    first = fake_stats(qwen3, seed=1, windows=(0, 2), num_tokens=200)
    second = fake_stats(qwen3, seed=2, windows=(1,), num_tokens=100)
    budget_bytes = half_of_the_experts(qwen3)
    merged: list[ExpertStats] = [first.merge(second), second.merge(first)]
    plans = [plan_for(qwen3, budget_bytes, stats=stats) for stats in merged]
    assert plans[0] == plans[1]


def test_deepseek_keeps_two_experts_even_for_top_1(tmp_path: Path) -> None:
    """Its router takes the best two of every group, also when there is one group."""
    folder = make_tiny_checkpoint(
        tmp_path / "model", "deepseek_v3", n_group=1, topk_group=1, num_experts_per_tok=1
    )
    checkpoint = Checkpoint(folder)
    plan = plan_for(checkpoint, minimum_bytes(checkpoint))
    assert all(len(plan.kept(row)) >= 2 for row in plan.forms)
