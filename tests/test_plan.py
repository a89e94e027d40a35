"""The plan file: what it refuses, and that it survives a round trip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_moe.errors import PlanError
from edge_moe.plan import PLAN_VERSION, MemoryTerm, Plan


def small_plan(**changes: Any) -> Plan:
    """Two MoE layers (1 and 2) of three experts."""
    share = [[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]
    fields: dict[str, Any] = {
        "edge_moe_version": "0.1.0",
        "model": "some/model",
        "model_type": "qwen3_moe",
        "model_fingerprint": "m",
        "stats_fingerprint": "s",
        "tasks": ["code"],
        "target": "native",
        "device": "cpu",
        "budget_bytes": 1000,
        "context_tokens": 16,
        "moe_layer_ids": [1, 2],
        "top_k": 1,
        "forms": [["bf16", "drop", "q4_0"], ["drop", "drop", "q8_0"]],
        "tiers": [["device", "none", "device"], ["none", "none", "device"]],
        "terms": [
            MemoryTerm(name="dense weights", num_bytes=300, source="headers"),
            MemoryTerm(name="experts", num_bytes=600, source="formula"),
        ],
        "loss": 1.5,
        "loss_unit": "apples",
        "frontier": [],
        "rivals": [],
        "saliency": share,
        "routed_share": share,
        "super_experts": [(1, 0)],
        "limits": [],
    }
    return Plan(**(fields | changes))


def test_a_round_trip_changes_nothing(tmp_path: Path) -> None:
    plan = small_plan()
    plan.save(tmp_path / "folder" / "plan.json")
    assert Plan.load(tmp_path / "folder" / "plan.json") == plan


def test_totals_terms_and_kept_experts() -> None:
    plan = small_plan()
    assert plan.total_bytes == 900
    assert plan.term("experts").num_bytes == 600
    assert [plan.kept(row) for row in plan.forms] == [[0, 2], [2]]
    with pytest.raises(KeyError):
        plan.term("KV cache")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 2}, "layer 2 keeps fewer than top_k=2"),
        ({"forms": [["bf16", "drop", "q5_7"], ["q8_0"] * 3]}, "layer 1 names the unknown form"),
        ({"forms": [["bf16", "drop"], ["drop", "q8_0"]]}, "tiers is not a 2 x 2 table"),
        ({"saliency": [[1.0, 0.0, 0.0]]}, "saliency is not a 2 x 3 table"),
        (
            {"tiers": [["device"] * 3, ["none", "none", "device"]]},
            "layer 1 expert 1 has form 'drop'",
        ),
        ({"tiers": [["none", "none", "device"]] * 2}, "layer 1 expert 0 has form 'bf16'"),
    ],
)
def test_an_inconsistent_plan_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    raw = json.loads(small_plan().model_dump_json()) | changes
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(PlanError, match="damaged") as caught:
        Plan.load(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_version_is_refused_by_number(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    raw = json.loads(small_plan().model_dump_json()) | {"version": PLAN_VERSION + 1}
    path.write_text(json.dumps(raw))
    with pytest.raises(PlanError, match=f"version {PLAN_VERSION + 1}.*reads {PLAN_VERSION}"):
        Plan.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 1}', "\x00\xff"])
def test_text_that_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(PlanError, match="plan.json"):
        Plan.load(path)


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="does not exist"):
        Plan.load(tmp_path / "plan.json")
