"""Making task deltas: against arithmetic done here, and files that are damaged."""

from __future__ import annotations

import hashlib
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILY_NAMES, TinyCheckpoint
from hand_plan import edit_config, fused_copy, hand_plan
from safetensors.numpy import load as load_numpy
from safetensors.torch import load_file, save_file
from tuned_models import noise, tuned_copy

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.delta_tensors import delta_parts
from edge_moe.converters.delta_writer import Scaling
from edge_moe.converters.make_delta import make_delta
from edge_moe.converters.sparsify import sparsify
from edge_moe.delta_file import DeltaFile
from edge_moe.delta_layout import DeltaTensor, unpack_tensor
from edge_moe.errors import CheckpointError, DeltaError, InputError
from edge_moe.tensor_info import FloatArray, read_range


def values_of(delta: DeltaFile, tensor: DeltaTensor) -> FloatArray:
    """scale * s, unpacked."""
    flat = np.zeros(math.prod(tensor.shape), np.float32)
    raw = read_range(delta.path, tensor.offset, tensor.num_bytes)
    for places, is_negative in unpack_tensor(tensor, raw, "it"):
        flat[places] = np.where(is_negative, -tensor.scale, tensor.scale)
    return flat.reshape(tensor.shape)


def expected(tau: FloatArray, density: float, scaling: Scaling) -> FloatArray:
    """By sorting the whole tensor."""
    flat = tau.reshape(-1).astype(np.float64)
    wanted = min(max(1, round(density * flat.size)), int((flat != 0).sum()))
    kept = np.argsort(-np.abs(flat), kind="stable")[:wanted]
    found = np.zeros(flat.size)
    if wanted:
        scales = {
            "l1": np.abs(flat).sum() / wanted,
            "least-squares": np.abs(flat[kept]).mean(),
            "alpha": (scaling.alpha or 0.0) * flat.std(),
        }
        found[kept] = np.sign(flat[kept]) * scales[scaling.rule]
    return found.reshape(tau.shape).astype(np.float32)


def test_threshold_scale_and_error_by_hand() -> None:
    """Half of 3, -1, 0, 1, -4, 1 is 3, -4 and the first of the ones."""
    tau = np.array([3, -1, 0, 1, -4, 1], np.float32)
    found = sparsify(lambda: iter([tau[:4], tau[4:]]), 0.5, lambda data: None)
    assert (found.num_kept, found.num_weights) == (3, 6)
    assert found.segments["kept"].tolist() == [2, 1]
    assert (found.magnitude, found.kept_magnitude, found.square) == (10, 8, 28)
    assert found.deviation == pytest.approx(math.sqrt(28 / 6))


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(
    ("density", "scaling"),
    [(0.05, Scaling()), (0.2, Scaling("least-squares")), (0.4, Scaling("alpha", 1.5))],
)
def test_every_tensor_is_that_of_a_sort(
    family: str,
    density: float,
    scaling: Scaling,
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
) -> None:
    folder = tiny_checkpoint(family)
    tuned = tuned_copy(folder, tmp_path / "tuned", noise)
    report = make_delta(folder, tuned, tmp_path / "it.delta", density=density, scaling=scaling)
    base, other = Checkpoint(folder), Checkpoint(tuned)
    delta = DeltaFile(tmp_path / "it.delta")
    kept = square = along = 0.0
    pairs = []
    for name, tensor in delta.dense():
        pairs.append((tensor, other.read(name) - base.read(name)))
    for layer_id in base.spec.moe_layer_ids:
        for expert_id in range(base.spec.num_experts):
            matrices = zip(
                delta.expert(layer_id, expert_id),
                base.expert(layer_id, expert_id),
                other.expert(layer_id, expert_id),
                strict=True,
            )
            pairs += [(tensor, second - first) for tensor, first, second in matrices]
    for tensor, tau in pairs:
        found = values_of(delta, tensor)
        np.testing.assert_allclose(found, expected(tau, density, scaling), rtol=1e-6)
        kept += np.count_nonzero(found)
        square += float((tau.astype(np.float64) ** 2).sum())
        signs = np.sign(found.astype(np.float64))
        along += float((tau * signs).sum() ** 2 / np.abs(signs).sum())
    assert (report.num_kept, report.num_weights) == (kept, sum(tau.size for _, tau in pairs))
    assert report.explained == pytest.approx(along / square, rel=1e-6)
    assert (report.scaling, delta.info.scale_rule) == (scaling, scaling.rule)
    assert report.num_bytes == (tmp_path / "it.delta").stat().st_size
    assert not list(tmp_path.glob(".*"))


def test_segments_are_packed_one_by_one(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same signs whatever the segments' length is; 1000 is no divisor of 64 x 64."""
    folder = tiny_checkpoint("qwen3_moe")
    tuned = tuned_copy(folder, tmp_path / "tuned", noise)
    make_delta(folder, tuned, tmp_path / "whole.delta", density=0.1)
    whole = DeltaFile(tmp_path / "whole.delta")
    wanted = [values_of(whole, tensor) for tensor in whole.tensors()]
    for name in ("delta_file", "delta_layout", "converters.delta_tensors"):
        monkeypatch.setattr(f"edge_moe.{name}.MOST_LENGTH", 1000)
    make_delta(folder, tuned, tmp_path / "parts.delta", density=0.1)
    parts = DeltaFile(tmp_path / "parts.delta")
    for tensor, values in zip(parts.tensors(), wanted, strict=True):
        assert len(tensor.segments) == -(-values.size // 1000)
        np.testing.assert_array_equal(values_of(parts, tensor), values)


def test_stopped_run_goes_on_and_gives_the_same_file(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("olmoe")
    tuned = tuned_copy(folder, tmp_path / "tuned", noise)
    make_delta(folder, tuned, tmp_path / "whole.delta")
    calls = []

    def stopping(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return sparsify(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("edge_moe.converters.make_delta.sparsify", stopping)
    with pytest.raises(KeyboardInterrupt):
        make_delta(folder, tuned, tmp_path / "it.delta")
    assert not (tmp_path / "it.delta").exists()
    with pytest.raises(InputError, match="unfinished"):
        make_delta(folder, tuned, tmp_path / "it.delta", density=0.5)
    make_delta(folder, tuned, tmp_path / "it.delta")
    num_tensors = DeltaFile(tmp_path / "it.delta").info.num_tensors
    assert len(calls) < 40 + num_tensors
    assert (tmp_path / "it.delta").read_bytes() == (tmp_path / "whole.delta").read_bytes()


def test_text_chooses_the_scale(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """Losses that fall up to alpha 6: 12 is not tried, and the file is that of --alpha 6."""
    folder = tiny_checkpoint("qwen3_moe")
    tried: list[float | None] = []
    tuned = tuned_copy(folder, tmp_path / "tuned", noise)

    def score(path: Path) -> float:
        alpha = DeltaFile(path).info.alpha
        tried.append(alpha)
        return abs((2.0 if alpha is None else alpha) - 6)

    report = make_delta(folder, tuned, tmp_path / "chosen.delta", score=score)
    assert tried == [None, 1, 2, 3, 4, 6, 8] and report.scaling == Scaling("alpha", 6)
    make_delta(folder, tuned, tmp_path / "given.delta", scaling=Scaling("alpha", 6))
    assert (tmp_path / "chosen.delta").read_bytes() == (tmp_path / "given.delta").read_bytes()
    make_delta(folder, tuned, tmp_path / "equal.delta", score=lambda path: 1.0)
    assert DeltaFile(tmp_path / "equal.delta").info.scale_rule == "l1"


def test_models_without_a_difference(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    with pytest.raises(InputError, match="hold the same weights"):
        make_delta(folder, folder, tmp_path / "it.delta")
    same = tuned_copy(folder, tmp_path / "same", lambda name, value, _: torch.zeros_like(value))
    edit_config(same, transformers_version="0.0")  # another fingerprint, the same weights
    with pytest.raises(InputError, match="hold the same weights"):
        make_delta(folder, same, tmp_path / "it.delta")
    assert [path.name for path in tmp_path.iterdir()] == ["same"]


def test_what_was_tuned_in_routers_alone_is_a_difference(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    def change(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.ones_like(value) * name.endswith("mlp.gate.weight")

    folder = tiny_checkpoint("qwen3_moe")
    tuned = tuned_copy(folder, tmp_path / "tuned", change)
    make_delta(folder, tuned, tmp_path / "it.delta", density=1.0)
    delta = DeltaFile(tmp_path / "it.delta")
    assert delta.num_kept == 2 * 8 * 64  # two routers [8, 64]
    delta.require_base(Checkpoint(folder).fingerprint)
    with pytest.raises(DeltaError, match="not for this model"):
        delta.require_base(Checkpoint(tuned).fingerprint)


def test_a_damaged_model_leaves_nothing(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    tuned = tuned_copy(
        folder, tmp_path / "tuned", lambda name, value, _: torch.full_like(value, torch.nan)
    )
    with pytest.raises(CheckpointError, match="NaN"):
        make_delta(folder, tuned, tmp_path / "it.delta")
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


def test_other_architectures_are_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder, out = tiny_checkpoint("qwen3_moe"), tmp_path / "it.delta"
    with pytest.raises(DeltaError, match=r"has model_type olmoe.*one architecture"):
        make_delta(folder, tiny_checkpoint("olmoe"), out)
    with pytest.raises(DeltaError, match="has hidden_size 256"):
        make_delta(folder, tiny_checkpoint("qwen3_moe", wide=True), out)
    turned = tuned_copy(folder, tmp_path / "turned", noise)
    edit_config(turned, rope_theta=5.0, rope_parameters=None)
    with pytest.raises(DeltaError, match=r"has rope_.*a delta carries weights, not settings"):
        make_delta(folder, turned, out)
    more = tuned_copy(folder, tmp_path / "more", noise)
    tensors = load_file(more / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(8)
    save_file(tensors, more / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DeltaError, match=r"q_proj.bias' is of shape \[8\].*it is missing"):
        make_delta(folder, more, out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "--density is 0.0"),
        ({"density": 1.5}, "1.5"),
        ({"scaling": Scaling("alpha", -1.0)}, "--alpha is -1"),
        ({"scaling": Scaling("alpha")}, "a rule of its own"),
        ({"scaling": Scaling("l1", 2.0)}, "a rule of its own"),
    ],
)
def test_bad_settings(
    options: dict[str, Any], message: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    with pytest.raises(InputError, match=message):
        make_delta(folder, folder, tmp_path / "it.delta", **options)


@pytest.fixture(scope="module")
def made(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    work = tmp_path_factory.mktemp("made")
    folder = tiny_checkpoint("qwen3_moe")
    tuned = tuned_copy(folder, work / "tuned", noise)
    make_delta(folder, tuned, work / "it.delta")
    return (work / "it.delta").read_bytes()


def test_truncated_anywhere(made: bytes, tmp_path: Path) -> None:
    path = tmp_path / "it.delta"
    for length in (0, 7, 100, 2000, len(made) // 2, len(made) - 1):
        path.write_bytes(made[:length])
        with pytest.raises(DeltaError):
            DeltaFile(path)
    with pytest.raises(DeltaError, match="does not exist"):
        DeltaFile(tmp_path / "none.delta")


def rewritten(made: bytes, path: Path, **changes: object) -> Path:
    """The same tensors under another header that its digest knows."""
    length = int.from_bytes(made[:8], "little")
    header = json.loads(made[8 : 8 + length])
    info = json.dumps(json.loads(header["__metadata__"]["edge_moe_delta"]) | changes)
    tables = load_numpy(made)
    digest = hashlib.sha256(info.encode())
    for name in ("scales", "kept", "sizes", "checksums", "coding"):
        digest.update(tables[name].tobytes())
    header["__metadata__"] = {"edge_moe_delta": info, "edge_moe_tables": digest.hexdigest()}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + made[8 + length :])
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 9}, "has version 9, this edge-moe reads 2"),
        ({"num_experts": 2**30}, "scales for"),
        ({"num_experts": 0}, "is damaged: num_experts: "),
        ({"dense": []}, "scales for"),
        ({"density": "nan"}, "is damaged: density: "),
        ({"moe_layer_ids": [0, 0]}, "twice"),
        ({"moe_layer_ids": [0, 5]}, "no 'layers.5'"),
        ({"expert_shapes": [[2**30, 2**30]] * 3}, "tables that are not of"),
        ({"moe_layer_ids": [0, 10**400]}, r"damaged: moe_layer_ids\.1: Input should be less than"),
        ({"moe_layer_ids": [-1, 0]}, r"damaged: moe_layer_ids\.0: Input should be greater"),
        ({"dense": [{"name": "a", "shape": [2**39] * 30}]}, r"dense\.0\.shape: Tuple should have"),
        ({"dense": [{"name": "a", "shape": [2**30] * 2}]}, r"shape: a tensor of 2\^48 entries"),
        ({"num_experts": 10**400}, "is damaged: num_experts: "),
        ({"scale_rule": "other"}, "is damaged: scale_rule: "),
        ({"extra": 1}, "is damaged: extra: "),
    ],
)
def test_header_that_promises_something_else(
    made: bytes, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DeltaError, match=message) as caught:
        DeltaFile(rewritten(made, tmp_path / "it.delta", **changes))
    assert len(str(caught.value)) < len(str(tmp_path)) + 250


def test_a_changed_header_is_seen(made: bytes, tmp_path: Path) -> None:
    path = rewritten(made, tmp_path / "it.delta")
    DeltaFile(path)
    path.write_bytes(path.read_bytes().replace(b'moe_layer_ids\\": [0', b'moe_layer_ids\\": [1', 1))
    with pytest.raises(DeltaError):
        DeltaFile(path)
    path.write_bytes(made.replace(b'alpha\\":null', b'alpha\\":1e00', 1))
    with pytest.raises(DeltaError, match="the checksum of its header and tables differs"):
        DeltaFile(path)


def test_changed_bytes_are_never_taken_for_others(made: bytes, tmp_path: Path) -> None:
    """Wherever a byte of tables or data changes, opening or unpacking says so."""
    path = tmp_path / "it.delta"
    path.write_bytes(made)
    good = DeltaFile(path)
    wanted = [values_of(good, tensor) for tensor in good.tensors()]
    start = 8 + int.from_bytes(made[:8], "little")
    generator = np.random.default_rng(0)
    for place in [start, *generator.integers(start, len(made), 60).tolist()]:
        path.write_bytes(made[:place] + bytes([made[place] ^ 0x11]) + made[place + 1 :])
        try:
            damaged = DeltaFile(path)
            found = [values_of(damaged, tensor) for tensor in damaged.tensors()]
        except DeltaError:
            continue
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, other)


def test_stacked_experts_are_the_same_experts(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """One model stores them one by one, the other stacked."""
    folder = tiny_checkpoint("qwen3_moe")
    tuned = tuned_copy(folder, tmp_path / "tuned", noise)
    stacked = fused_copy(tuned, tmp_path / "stacked")
    found = []
    for each in (tuned, stacked):
        make_delta(folder, each, tmp_path / f"{each.name}.delta", density=0.1)
        delta = DeltaFile(tmp_path / f"{each.name}.delta")
        found.append([values_of(delta, tensor) for tensor in delta.tensors()])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_expert_of_both_models_is_held(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """Whatever the number of layers is."""
    folder = tiny_checkpoint("qwen3_moe", wide=True)
    base, tuned = Checkpoint(folder), Checkpoint(tuned_copy(folder, tmp_path / "tuned", noise))
    parts = list(delta_parts(base, tuned))
    assert len(parts) == 3
    tracemalloc.start()
    for part in parts:
        for new_pieces in part.tensors:
            for _ in new_pieces()():
                pass
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    pair_bytes = 2 * 4 * base.spec.expert_weights
    assert pair_bytes <= held < 1.5 * pair_bytes  # and the last piece
    assert peak < 12 * base.spec.expert_weights + 4 * 2 * base.spec.expert_weights


def test_packages_are_no_bases(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    package = build(hand_plan(Checkpoint(folder), [["q8_0"] * 8] * 2), tmp_path / "out")
    with pytest.raises(InputError, match="is a package.*its delta fits the package"):
        make_delta(package, folder, tmp_path / "it.delta")


def test_other_safetensors_files_are_no_delta(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    with pytest.raises(DeltaError, match="is no task delta"):
        DeltaFile(tiny_checkpoint("qwen3_moe") / "model.safetensors")
