"""`benchmarks/split_dense.py` on a tiny model: nothing is lost where all experts are chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import split_dense as benchmark
from rich.console import Console
from tiny_models import make_tiny_dense


@pytest.mark.parametrize("top_k", [2, 4])
def test_the_table_of_a_tiny_model(tmp_path: Path, top_k: int) -> None:
    text = tmp_path / "rows.txt"
    text.write_text("\n".join(f"{i} and {i + 1} make {2 * i + 1}" for i in range(300)))
    dense = make_tiny_dense(tmp_path / "dense", "llama", width=64)
    sizes = {"num_experts": 4, "top_k": top_k, "max_windows": 6}
    folders = benchmark.made(dense, [str(text)], tmp_path, [0, 2], **sizes)
    result = benchmark.measure(dense, folders, tmp_path, [str(text)], 3)
    assert benchmark.made(dense, [str(text)], tmp_path, [0, 2], **sizes) == folders
    [loss] = result.losses[0].values()
    is_whole = top_k == 4
    assert (loss.mean_kld.value < 1e-6) == is_whole
    assert loss.same_top_p.value > 0.99 or not is_whole
    assert result.records[2].losses[-1].step == 2 and not result.records[0].losses
    benchmark.print_table(result, Console(width=200))
