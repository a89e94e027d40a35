"""GGUF files are inspected from their header alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_moe.cli import run
from edge_moe.errors import CheckpointError
from edge_moe.inspect_gguf import GgufInspection, inspect_gguf

gguf = pytest.importorskip("gguf", reason="needs the extra 'gguf'")


def write_gguf(path: Path, num_experts: int | None) -> Path:
    """One layer: q8_0 experts [E, 32, 64], a float32 norm [64]."""
    writer = gguf.GGUFWriter(str(path), "qwen3moe")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(512)
    if num_experts:
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(2)
    blocks = np.zeros((num_experts or 1, 32, 64), np.float32)
    packed = gguf.quants.quantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up_exps.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_bytes_and_counts(tmp_path: Path) -> None:
    found = inspect_gguf(write_gguf(tmp_path / "tiny.gguf", num_experts=4))
    assert (found.architecture, found.name, found.num_layers) == ("qwen3moe", "tiny", 1)
    assert (found.num_experts, found.top_k, found.num_shared_experts) == (4, 2, None)
    expert_bytes = 4 * 32 * 64 // 32 * 34
    assert {share.name: share.num_bytes for share in found.types} == {
        "Q8_0": expert_bytes,
        "F32": 64 * 4,
    }
    assert found.components[0].name == "routed experts"
    assert found.total_parameters == 4 * 32 * 64 + 64
    assert found.tensor_bytes == expert_bytes + 256
    assert found.file_bytes == (tmp_path / "tiny.gguf").stat().st_size


def test_command_prints_text_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_gguf(tmp_path / "tiny.gguf", num_experts=4))
    assert run(["inspect", path, "--json"]) == 0
    assert GgufInspection.model_validate_json(capsys.readouterr().out).num_experts == 4
    assert run(["inspect", path]) == 0
    assert "4 per layer, top-2" in capsys.readouterr().out


def test_a_dense_model_is_called_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(write_gguf(tmp_path / "dense.gguf", num_experts=None))]) == 0
    assert "not a mixture of experts" in capsys.readouterr().out


def test_truncated_file_is_one_error(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", num_experts=4)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="tiny.gguf: .* again"):
        inspect_gguf(path)


def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tmp_path / "none.gguf")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_split_model_is_counted_whole(tmp_path: Path) -> None:
    from gguf_files import write_moe

    types = ("F32",) * 3
    whole = inspect_gguf(write_moe(tmp_path / "whole.gguf", types=types, width=32))
    write_moe(tmp_path / "m.gguf", types=types, width=32, split_max_tensors=5)
    found = inspect_gguf(tmp_path / "m-00001-of-00003.gguf")
    assert (found.num_files, whole.num_files) == (3, 1)
    assert found.tensor_bytes == whole.tensor_bytes and found.components == whole.components
    parts = tmp_path.glob("m-*.gguf")
    assert found.file_bytes == sum(path.stat().st_size for path in parts)


def test_what_a_plan_would_start_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gguf_files import write_moe

    path = write_moe(tmp_path / "m.gguf", "deepseek2", keys={"expert_gating_func": 2})
    found = inspect_gguf(path)
    assert found.router == "sigmoid, not renormalised" and found.limits == []
    assert found.expert_forms == {"q4_k/q4_k/q6_k": 2}
    assert run(["inspect", str(path)]) == 0
    assert "q4_k/q4_k/q6_k (2 layers)" in capsys.readouterr().out
    unknown = write_moe(tmp_path / "grok.gguf", "grok", types=("F32",) * 3, width=32)
    assert run(["inspect", str(unknown)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "limit: not a source for plan:" in shown and "'grok' is not supported" in shown
