"""`benchmarks/upcycle.py` on a tiny model: every row is there, and packing MoTE loses nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import upcycle as benchmark
from rich.console import Console
from tiny_models import make_tiny_dense

from edge_moe.converters.upcycle.student import UpcycleSettings
from edge_moe.demo.model import new_dense_model, save_model
from edge_moe.demo.train import Recipe, Trainer


@pytest.mark.slow
def test_the_whole_table_of_a_tiny_model(tmp_path: Path) -> None:
    text = tmp_path / "rows.txt"
    text.write_text("\n".join(f"{i} and {i + 1} make {2 * i + 1}" for i in range(300)))
    dense = make_tiny_dense(tmp_path / "dense", "llama", width=256)
    job = benchmark.Job(
        dense=dense,
        data=[str(text)],
        work=tmp_path,
        settings=UpcycleSettings(steps=4, learning_rate=3e-3, warmup_steps=1, num_judgements=1),
        num_experts=2,
        top_k=1,
        max_windows=6,
        heldout_windows=3,
        tasks=[str(text)],
    )
    result = benchmark.measure(job)
    assert [row.name for row in result.rows] == [
        benchmark.DENSE,
        benchmark.FULL,
        "MoTE, not packed",
        "MoTE, tq1_0",
        "MoTE, tq2_0",
        benchmark.AFTER,
        benchmark.AFTER_GPTQ,
    ]
    assert result.rows[0].ppl_ratio[text.name].value == pytest.approx(1)
    assert result.row("MoTE, tq1_0").is_lossless and result.row("MoTE, tq2_0").is_lossless
    assert result.row(benchmark.AFTER).routed_bytes == result.row("MoTE, tq1_0").routed_bytes
    assert result.row("MoTE").ppl[text.name].value < result.rows[0].ppl[text.name].value
    again = benchmark.measure(job)
    assert again.rows == result.rows
    benchmark.print_table(result, Console(width=200))


def test_the_dense_demo_model_trains_and_resumes(demo_model: Path, tmp_path: Path) -> None:
    work = tmp_path
    (work / "tokens").mkdir()
    (work / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (work / "tokenizer" / name).write_bytes((demo_model / name).read_bytes())
    import numpy as np

    stream = np.arange(400, dtype=np.uint16)
    for split in ("train", "heldout"):
        stream.tofile(work / "tokens" / f"code.{split}.bin")
    recipe = Recipe(4, 2, sequences=1, sequence_tokens=32, is_dense=True)
    trainer = Trainer(work, recipe, {"code": 1.0})
    trainer.train_step()
    first = dict(trainer.losses)
    trainer.train_step()
    assert trainer.losses["code"] < first["code"]
    trainer.save("latest.pt")
    resumed = Trainer(work, recipe, {"code": 1.0})
    resumed.resume()
    assert resumed.step == 2
    assert (work / "dense/latest.pt").exists() and not (work / "latest.pt").exists()
    save_model(new_dense_model(), work / "tokenizer", work / "out")
    config = json.loads((work / "out/config.json").read_text())
    assert config["model_type"] == "llama" and "num_experts" not in config
