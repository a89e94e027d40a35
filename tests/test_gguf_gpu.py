"""Layers of a GGUF model on a GPU: the bill of RAM, what is refused, and what llama.cpp is told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cuda_paging
import cuda_paging_worker
import numpy as np
import pytest
import torch
from conftest import TinyCheckpoint
from float32_gguf import float32_gguf

from edge_moe.cli import run
from edge_moe.errors import InputError
from edge_moe.gguf_model import GgufModel
from edge_moe.runtime import gguf_session
from edge_moe.runtime.gguf_allotment import GPU_DRIVER_BYTES, session_terms
from edge_moe.runtime.gguf_session import GgufSession

pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp.llama_cpp")

PROMPT = list(range(5, 20))


@pytest.fixture(scope="module")
def path(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float32_gguf(tiny_checkpoint("qwen3_moe"), tmp_path_factory.mktemp("gpu") / "a.gguf")


def terms(path: Path, gpu_layers: int, context_tokens: int = 64) -> dict[str, int]:
    found = session_terms(GgufModel(path), context_tokens, has_budget=False, gpu_layers=gpu_layers)
    return {term.name: term.num_bytes for term in found}


def test_what_is_on_the_gpu_is_not_billed_as_ram(path: Path) -> None:
    model, without = GgufModel(path), terms(path, 0)
    assert "GPU driver" not in without
    one = terms(path, 1)  # may be the output matrix alone
    assert one == without | {"GPU driver": GPU_DRIVER_BYTES}
    num_layers = model.spec.num_layers
    last = f"blk.{num_layers - 1}."
    moved = sum(info.num_bytes for info in model.dense_tensors if info.name.startswith(last))
    two = terms(path, 2)
    assert 0 < moved and two["dense weights"] == without["dense weights"] - moved
    assert two["KV cache"] == without["KV cache"] - without["KV cache"] // num_layers
    every = terms(path, 1000)
    blocks = sum(info.num_bytes for info in model.dense_tensors if info.name.startswith("blk."))
    assert every["dense weights"] == without["dense weights"] - blocks
    assert every["KV cache"] == 0 and every["experts"] == without["experts"]


def test_a_build_without_a_gpu_says_how_to_get_one(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if llama_cpp.llama_supports_gpu_offload():
        pytest.skip("this llama.cpp has a GPU")
    command = ["run", str(path), "--prompt", "a", "--raw", "--gpu-layers", "2"]
    assert run(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--gpu-layers 2: the llama-cpp-python that is installed was built without" in said
    assert "GGML_CUDA=on" in said
    with pytest.raises(InputError, match="use 0 or more"):
        GgufSession.open(path, gpu_layers=-1)


def test_other_runtimes_refuse_layers(
    tiny_checkpoint: TinyCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny_checkpoint("qwen3_moe"))
    assert run(["run", folder, "--prompt", "a", "--raw", "--gpu-layers", "2"]) == 2
    assert "--gpu-layers is for .gguf files" in " ".join(capsys.readouterr().err.split())


def test_llama_cpp_is_told_and_experts_stay_ours(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GgufSession.open(path, context_tokens=64, num_slots=4, prefetch=False) as session:
        wanted = session.generate_ids(PROMPT, 8, stop_at_eos=False)
    told = []
    load = llama_cpp.llama_model_load_from_file_ptr

    def watched(file: Any, parameters: Any) -> Any:
        told.append(parameters.n_gpu_layers)
        return load(file, parameters)

    monkeypatch.setattr(llama_cpp, "llama_model_load_from_file_ptr", watched)
    monkeypatch.setattr(gguf_session, "require_gpu", lambda *_: None)
    # a build without GPUs computes the layers on the CPU
    with GgufSession.open(path, context_tokens=64, num_slots=4, gpu_layers=3) as session:
        assert session.generate_ids(PROMPT, 8, stop_at_eos=False) == wanted
        assert session.is_paging and session.statistics().misses > 0
        assert session.prefetch_trial is None
        assert any("--gpu-layers" in warning for warning in session.warnings)
    assert told == [3]
    for names, said in (
        (["transitions"], []),
        (["token", "router"], ["experts are read ahead by token, not by router"]),
    ):
        with GgufSession.open(
            path, context_tokens=64, num_slots=4, gpu_layers=3, predictors=names
        ) as session:
            assert session.generate_ids(PROMPT, 8, stop_at_eos=False) == wanted
            assert [each.partition(": ")[0] for each in session.warnings] == said


def test_the_benchmark_gives_llama_cpp_the_layers_that_fit(path: Path) -> None:
    model = GgufModel(path)
    rest = terms(path, 0, cuda_paging_worker.CONTEXT_TOKENS)
    layers = sorted(model.layers)
    of_layer = sum(info.num_bytes for info in model.layers[layers[0]].stacks)
    names = ("dense weights", "KV cache", "workspace")
    fixed = cuda_paging_worker.MARGIN_BYTES + sum(rest[name] for name in names)
    for num_fitting in range(len(layers) + 1):
        found = cuda_paging_worker.cpu_moe_layers(model, fixed + num_fitting * of_layer)
        assert found == layers[: len(layers) - num_fitting]
    # a build without GPUs computes the same with any of them
    rows = []
    for vram_bytes in (0, 2**40):
        step, facts = cuda_paging_worker.llama_cpp(path, vram_bytes)
        rows.append(step(PROMPT, 0))
        assert facts()["cpu_moe_layers"] == (0 if vram_bytes else len(layers))
    assert np.array_equal(*rows)


def test_the_benchmark_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(sys, "argv", ["cuda_paging.py", "--package", "a", "--text", "b"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        cuda_paging.main()


@pytest.mark.gpu
def test_offloaded_layers_keep_the_tokens(path: Path) -> None:
    if not llama_cpp.llama_supports_gpu_offload():
        pytest.skip("this llama.cpp was built without GPU support")
    with GgufSession.open(path, context_tokens=64, num_slots=4) as session:
        wanted = session.logits(PROMPT)
    with GgufSession.open(path, context_tokens=64, num_slots=4, gpu_layers=1000) as session:
        found = session.logits(PROMPT)
        assert session.is_paging and session.statistics().misses > 0
    assert abs(found - wanted).max() < 0.05 * abs(wanted).max()
