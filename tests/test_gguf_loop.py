"""calibrate -> plan -> build of a GGUF file, for every architecture that is calibrated."""

from __future__ import annotations

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
from llama_worker import ask_llama  # noqa: E402

from edge_moe.budget import non_expert_bytes  # noqa: E402
from edge_moe.checkpoint import Checkpoint  # noqa: E402
from edge_moe.converters.build import GGUF_NAME, build  # noqa: E402
from edge_moe.converters.calibrate_gguf import calibrate_gguf  # noqa: E402
from edge_moe.formats import DROP  # noqa: E402
from edge_moe.gguf_model import GgufModel  # noqa: E402
from edge_moe.plan import Plan  # noqa: E402
from edge_moe.planner import make_plan  # noqa: E402
from edge_moe.stats import ExpertStats  # noqa: E402

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
