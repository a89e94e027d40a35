"""calibrate -> plan -> build of a GGUF file, for every architecture that is calibrated."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny_checkpoint
from reference_model import load, masked, table_gelu

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

from float32_gguf import CALIBRATED, float32_gguf  # noqa: E402
from gguf_files import requantised  # noqa: E402
from llama_worker import ask_llama  # noqa: E402

from edge_moe.budget import non_expert_bytes  # noqa: E402
from edge_moe.checkpoint import Checkpoint  # noqa: E402
from edge_moe.cli import run  # noqa: E402
from edge_moe.converters.build import GGUF_NAME, build  # noqa: E402
from edge_moe.converters.calibrate_gguf import calibrate_gguf  # noqa: E402
from edge_moe.formats import DROP  # noqa: E402
from edge_moe.gguf_model import GgufModel  # noqa: E402
from edge_moe.plan import Plan  # noqa: E402
from edge_moe.planner import make_plan  # noqa: E402
from edge_moe.stats import ExpertStats  # noqa: E402
from edge_moe.units import format_bytes  # noqa: E402

IDS = [(7 * i * i + 3 * i) % 320 for i in range(64)]
TEXT = "def f(x):\n    return x + 1\n\nIt was the best of times, it was the worst of times.\n" * 3


def plan_at(model: GgufModel, stats: ExpertStats, expert_share: float) -> Plan:
    """The plan whose experts take that share of their bytes."""
    runtime = (0, "assumed")

    def plan(budget_bytes: int) -> Plan:
        return make_plan(
            *(model, stats, budget_bytes),
            model=str(model.path),
            target="gguf",
            runtime=runtime,  # type: ignore[arg-type]
        )

    whole = plan(10**12)
    whole_bytes = whole.term("experts").num_bytes
    return plan(non_expert_bytes(whole.terms) + int(expert_share * whole_bytes))


@pytest.mark.parametrize("family", CALIBRATED)
def test_what_is_planned_runs_as_the_masked_original(family: str, tmp_path: Path) -> None:
    greedy: dict[str, Any] = {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}
    config = greedy if family == "deepseek_v2" else {}
    folder = make_tiny_checkpoint(tmp_path / "source", family, dtype="float32", **config)
    model = GgufModel(float32_gguf(folder, tmp_path / "model.gguf"))
    task = tmp_path / "task.txt"
    task.write_text(TEXT)

    def stats(form: str) -> ExpertStats:
        options: dict[str, Any] = {"window_tokens": 32, "max_windows": 2, "forms": (form,)}
        return calibrate_gguf(model.path, [str(task)], tmp_path / form, **options)

    plan = plan_at(model, stats(DROP), 0.6)
    dropped = {
        layer: [expert for expert, form in enumerate(row) if form == DROP]
        for layer, row in zip(plan.moe_layer_ids, plan.forms, strict=True)
    }
    assert {len(ids) for ids in dropped.values()} == {4}
    path = build(plan, tmp_path / "pruned") / GGUF_NAME
    found = ask_llama(path, tmp_path, IDS).logits
    with table_gelu(), torch.no_grad():
        original = load(folder)
        with masked(original, Checkpoint(folder).spec, dropped):
            wanted = original(torch.tensor([IDS])).logits[0].numpy()
    scale = np.abs(wanted).max()
    assert np.abs(found - wanted).max() < 1e-3 * max(scale, 1.0)
    smaller = plan_at(model, stats("q4_0"), 0.1)
    assert smaller.quantiser == "imatrix"
    assert {form for row in smaller.forms for form in row} == {DROP, "q4_0"}
    path = build(smaller, tmp_path / "smaller", stats=tmp_path / "q4_0") / GGUF_NAME
    logits = ask_llama(path, tmp_path, IDS).logits
    assert logits.shape == found.shape and np.isfinite(logits).all()


@pytest.mark.skipif(find_spec("plotly") is None, reason="needs the extra 'report'")
def test_the_report_of_a_slice_shows_its_bytes_and_its_quality(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command on a quantised file: calibrate, plan, build, eval, report."""
    checkpoint = make_tiny_checkpoint(tmp_path / "source", "qwen3_moe", dtype="float32", width=256)
    whole = float32_gguf(checkpoint, tmp_path / "f32.gguf")
    model = requantised(whole, tmp_path / "model.gguf", {"_exps": "Q8_0"})
    (tmp_path / "task.txt").write_text(TEXT * 8)
    task, stats, plan_path = ("--task", tmp_path / "task.txt"), tmp_path / "stats", "plan.json"

    def printed(*arguments: object) -> str:
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr("sys.argv", ["edge-moe", *words])  # what a record repeats
        assert run(words) == 0
        return capsys.readouterr().out

    printed("calibrate", model, *task, "--window-tokens", 64, "-o", stats, "--forms", "q4_k")
    sized = ("--stats", stats, "--ctx", 256, "-o", tmp_path / plan_path)
    printed("plan", model, *sized, "--budget", "1GB", "--no-search")
    budget = Plan.load(tmp_path / plan_path)
    spared = int(0.6 * budget.term("experts").num_bytes)
    sizes = ("--budget", f"{budget.total_bytes - spared}B", "--search-seconds", 2)
    printed("plan", model, *sized, *sizes)
    plan, output = Plan.load(tmp_path / plan_path), tmp_path / "out"
    assert plan.search is not None and plan.search.trials
    printed("build", tmp_path / plan_path, "-o", output, "--stats", stats)
    scored = printed("eval", output / GGUF_NAME, *task, "--against", model, "--record", "--json")
    (result,) = json.loads(scored)

    facts = json.loads(printed("report", output, "--json"))
    assert facts["plan"]["total_bytes"] == plan.total_bytes
    rows = {row["name"]: row["planned_bytes"] for row in facts["terms"]}
    assert rows == {term.name: term.num_bytes for term in plan.terms} | {"total": plan.total_bytes}
    sliced = GgufModel(output / GGUF_NAME)
    experts_bytes = sum(
        sliced.spec.num_experts * sliced.expert_bytes(layer) for layer in sliced.spec.moe_layer_ids
    )
    assert rows["experts"] == experts_bytes, "what was planned is what the file holds"
    assert facts["evals"] == [result] and result["comparison"]["mean_kld"]["value"] > 1e-4
    assert facts["run"] is None, "llama.cpp runs it, not edge-moe"
    verbs = [command.split()[1] for command in facts["commands"]]
    assert verbs == ["calibrate", "plan", "build", "eval", "report"]

    page = " ".join(printed("report", output, "-o", tmp_path / "report.html").split())
    html = " ".join((tmp_path / "report.html").read_text(encoding="utf-8").split())
    kld = f"{result['comparison']['mean_kld']['value']:.3g}"
    for text in (page, html):
        assert f"Fits: {format_bytes(plan.total_bytes)} planned of" in text
        assert all(format_bytes(num_bytes) in text for num_bytes in rows.values())
        assert f"KL divergence {kld} nats on task.txt." in text
        assert f"{len(plan.search.trials)} plan" in text and "odd windows only" in text
    assert "quality not measured yet" not in page
    assert "of the source&#39;s expert bytes" in html and "experts&#39; 16-bit bytes" not in html
