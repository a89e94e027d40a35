"""Importance matrices: the numbers are those of calibration, and llama.cpp quantises with them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import make_tiny_checkpoint

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

from float32_gguf import float32_gguf  # noqa: E402
from llama_cpp import llama_cpp as llama  # noqa: E402

from edge_moe.cli import run as run_command  # noqa: E402
from edge_moe.converters.calibrate_gguf import calibrate_gguf  # noqa: E402
from edge_moe.converters.imatrix import write_imatrix  # noqa: E402
from edge_moe.errors import InputError, StatsError  # noqa: E402
from edge_moe.formats.ggml_library import quantize_chunk  # noqa: E402
from edge_moe.formats.ggml_types import GGML_TYPES_BY_NAME  # noqa: E402
from edge_moe.gguf_model import GgufModel  # noqa: E402
from edge_moe.moments import load_moments, moments_path  # noqa: E402
from edge_moe.runtime.gguf_logits import gguf_tokenizer  # noqa: E402
from edge_moe.runtime.llama_capture import LlamaCapture  # noqa: E402
from edge_moe.stats import ExpertStats  # noqa: E402
from edge_moe.tasks import task_windows  # noqa: E402

TEXT = "It was the best of times, it was the worst of times: 1 + 1 = 2.\n" * 4


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A float32 GGUF file, its statistics, and the task."""
    folder = tmp_path_factory.mktemp("imatrix")
    task = folder / "mine.txt"
    task.write_text(TEXT)
    checkpoint = make_tiny_checkpoint(folder / "model", "olmoe", width=256, dtype="float32")
    path = float32_gguf(checkpoint, folder / "model.gguf")
    calibrate_gguf(path, [str(task)], folder / "stats", window_tokens=64, forms=("drop",))
    return path, folder / "stats", str(task)


def read(path: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[np.float32]]]:
    """Metadata and tensors, by the gguf package."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: tensor.data for tensor in reader.tensors}


def test_numbers_are_sums_over_what_llama_cpp_multiplied(
    measured: tuple[Path, Path, str], tmp_path: Path
) -> None:
    path, stats, task = measured
    keys, tensors = read(write_imatrix(stats, tmp_path / "imatrix.gguf"))
    model = GgufModel(path)
    with gguf_tokenizer(path) as tokenizer:
        windows = task_windows([task], "calibration", tokenizer, 64)
    assert keys["general.type"] == "imatrix" and "general.architecture" not in keys
    assert keys["imatrix.datasets"] == ["mine.txt"]
    assert (keys["imatrix.chunk_count"], keys["imatrix.chunk_size"]) == (len(windows), 64)
    sums = {layer_id: np.zeros((8, 256)) for layer_id in (0, 1)}
    counts = {layer_id: np.zeros(8) for layer_id in (0, 1)}

    def take(layer_id: int, tokens: slice, block: Any) -> None:
        for token, ids in enumerate(block.expert_ids[:, :2]):
            sums[layer_id][ids] += block.inputs[token].astype(np.float64) ** 2
            counts[layer_id][ids] += 1

    with LlamaCapture(path, model.spec, "olmoe", 64) as capture:
        for window in windows:
            capture.run(window, take)
    for layer_id in (0, 1):
        for name in ("ffn_gate_exps", "ffn_up_exps"):
            found = tensors[f"blk.{layer_id}.{name}.weight.in_sum2"]
            np.testing.assert_allclose(found, sums[layer_id], rtol=1e-5)
        inner = tensors[f"blk.{layer_id}.ffn_down_exps.weight.in_sum2"]
        moments = load_moments(stats, layer_id, model.spec)
        np.testing.assert_allclose(inner, moments.inner_squares.values(), rtol=1e-6)
        for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            found = tensors[f"blk.{layer_id}.{name}.weight.counts"]
            np.testing.assert_array_equal(found.ravel(), counts[layer_id])
            assert found.shape == (8, 1)
    assert len(tensors) == 2 * 3 * 2


def test_llama_cpp_quantises_with_it(measured: tuple[Path, Path, str], tmp_path: Path) -> None:
    """IQ2_XXS cannot be made without; the bytes are those of ggml with the same importance."""
    path, stats, _ = measured
    _, tensors = read(write_imatrix(stats, tmp_path / "imatrix.gguf"))
    importance = {}
    for name in (name for name in tensors if name.endswith(".in_sum2")):
        matrix = name.removesuffix(".in_sum2")
        sums, counts = tensors[name], tensors[f"{matrix}.counts"]
        # as llama.cpp's tools/quantize reads it: means, and 1 for an expert without tokens
        means = np.where(counts > 0, sums / np.maximum(counts, 1), 1)
        importance[matrix] = np.ascontiguousarray(means, np.float32)
    assert quantize(path, tmp_path / "without.gguf", {}) != 0
    assert quantize(path, tmp_path / "out.gguf", importance) == 0
    model, made = GgufModel(path), GgufModel(tmp_path / "out.gguf")
    assert made.stored_types(0) == ("iq2_xxs",) * 3
    kind = GGML_TYPES_BY_NAME["IQ2_XXS"]
    info, offset, num_bytes = made.expert_ranges(1, 3)[2]
    with info.path.open("rb") as handle:
        handle.seek(offset)
        packed = handle.read(num_bytes)
    rows = importance["blk.1.ffn_down_exps.weight"][3]
    assert packed == quantize_chunk(kind, model.expert(1, 3)[2], rows).tobytes()


def quantize(source: Path, output: Path, importance: dict[str, npt.NDArray[np.float32]]) -> int:
    """llama.cpp's own: experts as IQ2_XXS, the rest as Q8_0."""
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = llama.LLAMA_FTYPE_MOSTLY_Q8_0
    parameters.nthread = 1
    overrides = (llama.llama_model_tensor_override * 2)()
    overrides[0].pattern = rb"ffn_(gate|up|down)_exps"
    overrides[0].type = GGML_TYPES_BY_NAME["IQ2_XXS"].ggml_type
    parameters.tt_overrides = overrides
    entries = (llama.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if importance:
        parameters.imatrix = entries
    code: int = llama.llama_model_quantize(
        str(source).encode(), str(output).encode(), ctypes.byref(parameters)
    )
    return code


def test_the_command_writes_one(
    measured: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, stats, _ = measured
    path = tmp_path / "x.gguf"
    assert run_command(["stats", "imatrix", str(stats), "-o", str(path)]) == 0
    assert "llama-quantize --imatrix" in " ".join(capsys.readouterr().err.split())
    assert path.read_bytes() == write_imatrix(stats, tmp_path / "y.gguf").read_bytes()


def test_what_is_missing_is_named(measured: tuple[Path, Path, str], tmp_path: Path) -> None:
    _, stats, _ = measured
    with pytest.raises(InputError, match="is a folder"):
        write_imatrix(stats, tmp_path)
    with pytest.raises(StatsError, match="no finished statistics"):
        write_imatrix(tmp_path, tmp_path / "x.gguf")
    ExpertStats.load(stats).save(tmp_path / "bare")
    with pytest.raises(StatsError, match="not readable"):
        write_imatrix(tmp_path / "bare", tmp_path / "x.gguf")
    for layer_id in (0, 1):
        target = moments_path(tmp_path / "bare", layer_id)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(moments_path(stats, 0).read_bytes()[: None if layer_id == 0 else 50])
    with pytest.raises(StatsError, match="layer_0001.* calibrate again"):
        write_imatrix(tmp_path / "bare", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
