"""What a GGUF model's layers keep of the past: the bill against llama.cpp's own log."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny_checkpoint
from gguf_files import write_moe

from edge_moe.budget import memory_terms
from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import SpecError
from edge_moe.gguf_model import GgufModel
from edge_moe.plan import MemoryTerm
from edge_moe.spec import ModelSpec

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

from float32_gguf import CALIBRATED, float32_gguf  # noqa: E402

CONTEXT_TOKENS = 2048

LOG_OF_CONTEXT = """
import ctypes, sys
from llama_cpp import llama_cpp as llama

lines = []
callback = llama.llama_log_callback(lambda level, text, _: lines.append(text.decode()))
llama.llama_log_set(callback, ctypes.c_void_p(0))
model = llama.llama_model_load_from_file(sys.argv[1].encode(), llama.llama_model_default_params())
parameters = llama.llama_context_default_params()
parameters.n_ctx, parameters.swa_full = int(sys.argv[2]), False
assert llama.llama_init_from_model(model, parameters)
print("".join(lines))
"""


def cached_bytes(spec: ModelSpec, context_tokens: int = CONTEXT_TOKENS) -> int:
    return kv_term(spec, context_tokens).num_bytes


def kv_term(spec: ModelSpec, context_tokens: int) -> MemoryTerm:
    terms = memory_terms(
        spec,
        forms=[],
        dense_bytes=0,
        context_tokens=context_tokens,
        device="cpu",
        target="gguf",
        runtime_bytes=0,
        runtime_source="assumed",
    )
    return next(term for term in terms if term.name == "KV cache")


@pytest.mark.parametrize("family", CALIBRATED)
def test_the_bill_is_what_llama_cpp_allocates(family: str, tmp_path: Path) -> None:
    greedy: dict[str, Any] = {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}
    config = greedy if family == "deepseek_v2" else {}
    checkpoint = Checkpoint(make_tiny_checkpoint(tmp_path / "source", family, **config))
    path = float32_gguf(checkpoint.folder, tmp_path / "model.gguf")
    command = [sys.executable, "-c", LOG_OF_CONTEXT, str(path), str(CONTEXT_TOKENS)]
    log = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.findall(r"llama_(?:kv_cache|memory_recurrent): size = +([0-9.]+) MiB", log)
    assert found, log[-2000:]
    spec = GgufModel(path).spec
    allocated = sum(float(size) for size in found) * 2**20
    assert cached_bytes(spec) == pytest.approx(allocated, abs=0.005 * 2**20 * len(found))
    wanted = checkpoint.spec
    assert spec.num_sliding_layers == wanted.num_sliding_layers
    assert spec.num_state_layers == wanted.num_state_layers
    stateless = (cached_bytes(replace(each, state_values=0)) for each in (spec, wanted))
    assert len(set(stateless)) == 1  # a plan from either source reserves the same


def spec_of(path: Path, arch: str, **keys: Any) -> ModelSpec:
    types = ("F32",) * 3
    return GgufModel(write_moe(path, arch, types=types, width=32, num_layers=8, keys=keys)).spec


def test_the_bill_says_how_sliding_layers_are_kept_small(tmp_path: Path) -> None:
    for arch, is_said in (("gpt-oss", True), ("qwen3moe", False)):
        spec = spec_of(tmp_path / "m.gguf", arch, **{"attention.sliding_window": 16})
        assert ("swa_full=False" in kv_term(spec, 100).note) == is_said


def test_layers_by_period_where_no_key_lists_them(tmp_path: Path) -> None:
    """8 layers, 2 key and value heads of 8 values each."""
    window = {"attention.sliding_window": 16}
    for arch, period, num_sliding in (("gpt-oss", None, 4), ("mellum", None, 6), ("mellum", 8, 7)):
        keys = {} if period is None else {"attention.sliding_window_pattern": period}
        spec = spec_of(tmp_path / "m.gguf", arch, **window, **keys)
        assert (spec.num_sliding_layers, spec.sliding_window) == (num_sliding, 16)
        assert spec.sliding_kv_width == 32
        assert spec.kv_bytes(100, 2) == 2 * 32 * (num_sliding * 16 + (8 - num_sliding) * 100)
    assert spec_of(tmp_path / "m.gguf", "mellum").num_sliding_layers == 0
    # a graph that knows no window ignores the key
    assert spec_of(tmp_path / "m.gguf", "qwen3moe", **window).num_sliding_layers == 0
    states = {"ssm.inner_size": 64, "ssm.state_size": 8, "ssm.group_count": 2, "ssm.conv_kernel": 4}
    spec = spec_of(tmp_path / "m.gguf", "qwen3next", **states)
    assert spec.num_state_layers == 6 and spec.kv_bytes_per_token(2) == 2 * 2 * 32
    assert spec.state_values == 6 * (3 * (64 + 2 * 2 * 8) + 64 * 8)


def test_a_list_of_layers_that_is_too_short_is_refused(tmp_path: Path) -> None:
    keys = {"attention.sliding_window": 16, "attention.sliding_window_pattern": [True, False]}
    with pytest.raises(SpecError, match="expected a boolean for each of 8 layers"):
        spec_of(tmp_path / "m.gguf", "gpt-oss", **keys)
    with pytest.raises(SpecError, match="expected a number for each of 8 layers"):
        spec_of(tmp_path / "m.gguf", "jamba", **{"attention.head_count_kv": [0, 2]})
