"""What `plan` prints, worked out on a plan small enough to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from edge_moe.plan import FrontierPoint, MemoryTerm, Plan, Rival, SearchRecord, SearchTrial
from edge_moe.plan_table import (
    MAX_FRONTIER_ROWS,
    form_counts,
    frontier_rows,
    print_plan,
    summarise_plan,
)

FORMS = [["drop", "q4_0", "q8_0"], ["q4_0", "q4_0", "bf16"]]


def small_plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "edge_moe_version": "0.1.0",
        "model": "/models/tiny [v2]",
        "model_type": "qwen3_moe",
        "model_fingerprint": "m",
        "stats_fingerprint": "s",
        "tasks": ["code"],
        "target": "native",
        "device": "cpu",
        "budget_bytes": 1000,
        "context_tokens": 512,
        "moe_layer_ids": [0, 1],
        "top_k": 1,
        "forms": FORMS,
        "tiers": [["none", "device", "device"], ["device"] * 3],
        "terms": [
            MemoryTerm(name="dense weights", num_bytes=300, source="headers"),
            MemoryTerm(name="experts", num_bytes=500, source="formula"),
        ],
        "loss": 2.0,
        "loss_unit": "squared output error",
        "frontier": [
            FrontierPoint(total_bytes=300 + size, expert_bytes=size, loss=1000 / size)
            for size in range(50, 1000, 10)
        ],
        "rivals": [Rival(name="prune only", expert_bytes=490, loss=8.0, forms=FORMS)],
        "saliency": [[0.1, 0.2, 0.7]] * 2,
        "routed_share": [[0.1, 0.2, 0.7]] * 2,
        "super_experts": [(1, 2)],
        "form_bytes": {"q4_0": 40, "q8_0": 80, "bf16": 160},
        "limits": ["one count for all layers [really]"],
        "warnings": ["little evidence"],
    }
    return Plan.model_validate(values | changes)


def printed(plan: Plan) -> str:
    console = Console(width=110, record=True, file=Path("/dev/null").open("w"))
    print_plan(plan, Path("plan.json"), console, Path("stats"))
    return console.export_text()


def test_forms_are_counted_from_fewest_bits() -> None:
    assert form_counts(FORMS) == {"drop": 1, "q4_0": 3, "q8_0": 1, "bf16": 1}


def test_page_says_what_a_person_needs() -> None:
    text = printed(small_plan())
    assert "FITS 1.00 kB with 200 B to spare: /models/tiny [v2] for code" in text
    assert "6 experts: 1 dropped, 3 q4_0 (4-bit of 40 B)" in text
    assert "1 protected as super experts" in " ".join(text.split())
    assert "<- this plan" in text
    assert "limit: one count for all layers [really]" in text  # brackets are not markup
    assert "warning: little evidence" in text
    assert "next: edge-moe build plan.json -o OUT" in text
    rival = next(line for line in text.splitlines() if line.startswith("prune only"))
    assert rival.split()[2:] == ["490", "B", "8", "4"]  # four times the loss of the plan


def test_a_plan_without_loss_has_no_ratios() -> None:
    text = printed(small_plan(loss=0.0))
    rival = next(line for line in text.splitlines() if line.startswith("prune only"))
    assert rival.split()[2:] == ["490", "B", "8"]


def test_frontier_is_thinned_and_keeps_this_plan() -> None:
    plan = small_plan()
    rows = frontier_rows(plan)
    assert len(rows) <= MAX_FRONTIER_ROWS
    assert [row.total_bytes for row in rows] == sorted(row.total_bytes for row in rows)
    assert sum(row.total_bytes == plan.total_bytes for row in rows) == 1
    assert rows[-1].total_bytes == 1290  # the largest point is always shown


def test_summary_leaves_out_tables_of_experts() -> None:
    summary = summarise_plan(small_plan(), Path("plan.json"))
    assert summary.fits
    assert summary.rivals[0].name == "prune only"
    assert "saliency" not in summary.model_dump()
    assert not summarise_plan(small_plan(budget_bytes=799), Path("plan.json")).fits


def test_what_ended_a_search_early_is_said() -> None:
    search = SearchRecord(
        chosen="a", is_complete=False, seconds=1.0, trials=[SearchTrial(name="a", kld=0.1)]
    )
    text = " ".join(printed(small_plan(search=search)).split())
    assert "the time ran out before every proposal was measured: --search-seconds gives" in text
    failed = search.model_copy(update={"failure": "/data: No space left", "trials": []})
    text = " ".join(printed(small_plan(search=failed)).split())
    assert "no more could be measured: /data: No space left" in text
    assert "--search-seconds" not in text and "Measured: mean KL" not in text


def test_measured_plans_are_counted_in_words_that_agree() -> None:
    for count, words in ((1, "search: 1 plan measured"), (2, "search: 2 plans measured")):
        trials = [SearchTrial(name=f"way {index}", kld=0.1) for index in range(count)]
        search = SearchRecord(chosen="way 0", is_complete=True, seconds=1.0, trials=trials)
        assert words in printed(small_plan(search=search))
