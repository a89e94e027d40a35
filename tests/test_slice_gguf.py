"""Slicing a GGUF: kept blocks are the same bytes, and llama.cpp computes the masked original."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import TinyCheckpoint, make_tiny_checkpoint
from fake_stats import fake_stats
from float32_gguf import float32_gguf
from gguf_files import requantised, write_gpt_oss, write_moe
from hand_plan import hand_plan, uniform_forms
from llama_worker import ask_llama
from peak_memory import measure_peak, needs_proc
from slice_gguf import synthetic_gguf

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters import copy_range
from edge_moe.converters.build import GGUF_NAME, build
from edge_moe.converters.export_gguf import export_gguf
from edge_moe.converters.slice_gguf import slice_gguf
from edge_moe.errors import (
    CheckpointError,
    DiskSpaceError,
    InputError,
    PlanError,
    TargetError,
)
from edge_moe.families import FAMILIES
from edge_moe.formats import DROP, split_form
from edge_moe.formats.quantise import pack_matrix
from edge_moe.gguf_header import GgufTensorInfo
from edge_moe.gguf_model import GgufModel
from edge_moe.moments import LayerMoments, moments_path
from edge_moe.offer import stored_forms
from edge_moe.plan import CalibrationOptions, Plan
from edge_moe.planner import stats_fingerprint
from edge_moe.tensor_info import read_range

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp", reason="needs libggml")

READ = sorted(family for family, table in FAMILIES.items() if table.gguf_arch)
IDS = [int(i) for i in np.random.default_rng(0).integers(1, 250, 40)]
F32 = ("F32",) * 3


def stored_plan(model: GgufModel, kept: list[list[int]]) -> Plan:
    """Experts `kept` per layer as they are stored, the others dropped."""
    forms = [
        [form if expert in ids else DROP for expert in range(model.spec.num_experts)]
        for form, ids in zip(stored_forms(model), kept, strict=True)
    ]
    return hand_plan(model, forms, "gguf")


def keep_all(model: GgufModel) -> Plan:
    return stored_plan(model, [list(range(model.spec.num_experts))] * model.spec.num_moe_layers)


def content(info: GgufTensorInfo) -> bytes:
    return read_range(info.path, info.offset, info.num_bytes)


def rows(info: GgufTensorInfo, kept: list[int]) -> bytes:
    """The bytes of some experts of a tensor."""
    whole = np.frombuffer(content(info), np.uint8).reshape(info.shape[0], -1)
    return whole[kept].tobytes()


# ---------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("split", [0, 5])
def test_keeping_all_is_the_same_file(split: int, tmp_path: Path) -> None:
    write_moe(tmp_path / "m.gguf", split_max_tensors=split)
    source = min(tmp_path.glob("m*.gguf"))
    model = GgufModel(source)
    output = slice_gguf(keep_all(model), model, tmp_path / "out.gguf")
    found = GgufModel(output)
    assert list(found.tensors) == list(model.tensors)
    for name, info in found.tensors.items():
        wanted = model.tensors[name]
        assert (info.shape, info.type_name) == (wanted.shape, wanted.type_name)
        assert content(info) == content(wanted), name
    kept_keys = [key for key in model.header.metadata if not key.startswith("split.")]
    own = ["edge_moe.version", "edge_moe.source_fingerprint", "edge_moe.plan_fingerprint"]
    assert list(found.header.metadata) == kept_keys + own
    for key in kept_keys:
        assert found.header.raw_key(key) == model.header.raw_key(key)
    assert found.header.metadata["edge_moe.source_fingerprint"] == model.fingerprint
    reader = gguf.GGUFReader(output)  # a second implementation finds the same
    for tensor in reader.tensors:
        assert bytes(tensor.data.tobytes()) == content(model.tensors[tensor.name])
    again = slice_gguf(keep_all(found), found, tmp_path / "again.gguf")
    assert list(GgufModel(again).header.metadata) == kept_keys + own  # provenance is replaced


@pytest.mark.parametrize("way", [copy_range._in_kernel, copy_range._send, copy_range._by_buffer])
@pytest.mark.parametrize("merged", [False, True])
def test_kept_experts_are_copied_and_their_rows_follow(
    merged: bool, way: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way is not copy_range._in_kernel:
        monkeypatch.setattr(copy_range, "_in_kernel", _refuse)
    if way is copy_range._by_buffer:
        monkeypatch.setattr(copy_range, "_send", _refuse)
    random = np.random.default_rng(2)
    tensors = {
        "blk.0.exp_probs_b.bias": random.normal(size=6),
        "blk.1.exp_probs_b": random.normal(size=6),
        "blk.0.ffn_gate_inp.bias": random.normal(size=6),
        "blk.0.ffn_gate_inp.scale": random.normal(size=256),
        "blk.1.ffn_down_exps.bias": random.normal(size=(6, 256)),
        "blk.1.ffn_up_exps.scale": random.normal(size=6),
        "blk.1.ffn_gate_inp_shexp.weight": random.normal(size=256),
    }
    path = write_moe(tmp_path / "m.gguf", num_experts=6, merged=merged, tensors=tensors)
    model = GgufModel(path)
    kept = [[0, 1, 4], [2, 3, 5]]
    found = GgufModel(slice_gguf(stored_plan(model, kept), model, tmp_path / "out.gguf"))
    assert found.spec.num_experts == 3 and found.spec.top_k == 2
    sliced = 0
    for name, info in model.tensors.items():
        result = found.tensors[name]
        if info.shape[0] == 6:
            layer = int(name.split(".")[1])
            assert content(result) == rows(info, kept[layer]), name
            sliced += 1
        else:
            assert content(result) == content(info), name
    assert sliced == 2 * (3 if merged else 4) + 5
    for mine, theirs in zip(found.expert(1, 0), model.expert(1, 2), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def _refuse(*_: object) -> int:
    raise OSError(errno.EXDEV, "another device")


def test_slicing_an_export_is_exporting_the_plan(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Cutting a quantised file gives the bytes that quantising the kept experts gives."""
    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe", wide=True))
    whole = hand_plan(checkpoint, uniform_forms(checkpoint, 8, "q4_k"), "gguf")
    model = GgufModel(export_gguf(whole, checkpoint, tmp_path / "whole.gguf"))
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 5, "q4_k"), "gguf")
    wanted = GgufModel(export_gguf(plan, checkpoint, tmp_path / "wanted.gguf"))
    kept = [plan.kept(row) for row in plan.forms]
    found = GgufModel(slice_gguf(stored_plan(model, kept), model, tmp_path / "found.gguf"))
    assert set(found.tensors) == set(wanted.tensors)
    for name, info in found.tensors.items():
        assert content(info) == content(wanted.tensors[name]), name
    for key in wanted.header.metadata:
        if not key.startswith("edge_moe."):
            assert found.header.raw_key(key) == wanted.header.raw_key(key), key


# ---------------------------------------------------------------------------- llama.cpp


def masked_logits(folder: Path, kept: list[list[int]]) -> npt.NDArray[np.float32]:
    """[T, V] of transformers with all experts there, and routers that never choose the others."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for layer, ids in zip(model.model.layers, kept, strict=True):
        gate = layer.mlp.gate
        mask = torch.full((len(gate.weight),), -torch.inf)
        mask[ids] = 0.0

        def forward(hidden: Any, gate: Any = gate, mask: Any = mask) -> Any:
            logits = hidden.reshape(-1, hidden.shape[-1]) @ gate.weight.T + mask
            scores = logits.softmax(-1)
            weights, chosen = scores.topk(gate.top_k, dim=-1)
            if gate.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights, chosen

        gate.forward = forward
    with torch.no_grad():
        logits: npt.NDArray[np.float32] = model(torch.tensor([IDS])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_llama_cpp_computes_the_masked_original(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint(family))
    whole = hand_plan(checkpoint, uniform_forms(checkpoint, 8, "f32"), "gguf")
    model = GgufModel(export_gguf(whole, checkpoint, tmp_path / "whole.gguf"))
    kept = [[0, 2, 3, 6, 7], [1, 2, 4, 5, 7]]
    path = slice_gguf(stored_plan(model, kept), model, tmp_path / "sliced.gguf")
    found = ask_llama(path, tmp_path, IDS).logits
    assert np.abs(found - masked_logits(checkpoint.folder, kept)).max() < 1e-3
    unsliced = ask_llama(tmp_path / "whole.gguf", tmp_path, IDS).logits
    assert np.abs(found - unsliced).max() > 1e-2  # the experts that went mattered
    all_kept = slice_gguf(keep_all(model), model, tmp_path / "all.gguf")
    np.testing.assert_array_equal(ask_llama(all_kept, tmp_path, IDS).logits, unsliced)


@pytest.mark.parametrize("family", READ)
def test_every_family_is_sliced_as_its_checkpoint_is_pruned(family: str, tmp_path: Path) -> None:
    """Slicing the GGUF and pruning the Hugging Face folder first give the same file."""
    greedy = {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}
    config: dict[str, Any] = greedy if family == "deepseek_v2" else {}
    checkpoint = Checkpoint(make_tiny_checkpoint(tmp_path / "source", family, **config))
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 4), "hf")
    pruned = build(plan, tmp_path / "pruned", target="hf")
    wanted = GgufModel(float32_gguf(pruned, tmp_path / "wanted.gguf"))
    model = GgufModel(float32_gguf(checkpoint.folder, tmp_path / "whole.gguf"))
    kept = [plan.kept(row) for row in plan.forms]
    path = slice_gguf(stored_plan(model, kept), model, tmp_path / "sliced.gguf")
    found = GgufModel(path)
    assert found.spec == wanted.spec
    assert set(found.tensors) == set(wanted.tensors)
    for name, info in found.tensors.items():
        assert content(info) == content(wanted.tensors[name]), name
    logits = ask_llama(path, tmp_path, IDS).logits
    assert logits.shape == (len(IDS), checkpoint.spec.vocab_size) and np.isfinite(logits).all()


@pytest.mark.parametrize("type_name", ["MXFP4", "Q4_0", "IQ4_NL"])
def test_a_quantised_slice_is_the_masked_file_bit_for_bit(
    type_name: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """llama.cpp itself masks: gpt-oss routers have a bias, and hopeless experts are not chosen."""
    tokenizer = tiny_checkpoint("qwen3_moe")
    kept = [[0, 2, 3, 7], [1, 4, 5, 6]]
    masked = {layer: [e for e in range(8) if e not in ids] for layer, ids in enumerate(kept)}
    source = write_gpt_oss(tmp_path / "m.gguf", tokenizer, type_name, masked={})
    wanted = write_gpt_oss(tmp_path / "masked.gguf", tokenizer, type_name, masked=masked)
    model = GgufModel(source)
    assert model.expert_biases(1, 7) is not None and model.spec.hidden_act == "swiglu_oai"
    path = slice_gguf(stored_plan(model, kept), model, tmp_path / "sliced.gguf")
    found, expected, whole = (ask_llama(p, tmp_path, IDS).logits for p in (path, wanted, source))
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - whole).max() > 1e-2


def test_a_quantised_mix_runs_and_keeps_the_tokenizer(demo_model: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(demo_model)
    num_experts = checkpoint.spec.num_experts
    whole = hand_plan(checkpoint, uniform_forms(checkpoint, num_experts, "f32"), "gguf")
    exported = export_gguf(whole, checkpoint, tmp_path / "f32.gguf")
    types = {"ffn_(gate|up)_exps": "Q5_0", "ffn_down_exps": "Q8_0", "attn_(q|k|v|output).w": "Q8_0"}
    source = requantised(exported, tmp_path / "mixed.gguf", types)
    model = GgufModel(source)
    assert set(stored_forms(model)) == {"q5_0/q5_0/q8_0"}
    kept = _kept_by_hand(model, 12)
    path = slice_gguf(stored_plan(model, kept), model, tmp_path / "sliced.gguf")
    texts = ["def add(a, b):", "Grüße, 漢字 🙂"]
    found, before = (ask_llama(p, tmp_path, IDS, texts) for p in (path, source))
    assert found.tokens == before.tokens
    # the same choice of experts, cut out of the float32 file, then quantised
    wide = GgufModel(exported)
    cut = slice_gguf(stored_plan(wide, kept), wide, tmp_path / "cut.gguf")
    expected = ask_llama(requantised(cut, tmp_path / "expected.gguf", types), tmp_path, IDS)
    np.testing.assert_array_equal(found.logits, expected.logits)


def _kept_by_hand(model: GgufModel, count: int) -> list[list[int]]:
    return [
        sorted(np.random.default_rng(layer).permutation(model.spec.num_experts)[:count].tolist())
        for layer in model.spec.moe_layer_ids
    ]


# ---------------------------------------------------------------------------- other types


def test_types_change_where_the_plan_says_so(tmp_path: Path) -> None:
    model = GgufModel(write_moe(tmp_path / "m.gguf", keys={"x": 1}))
    forms = [
        ["q3_k/q4_k/q6_k", DROP, "q3_k/q4_k/q6_k", "q3_k/q4_k/q6_k"],
        [DROP, "q2_k", "q2_k", "q2_k"],
    ]
    plan = hand_plan(model, forms, "gguf")
    found = GgufModel(slice_gguf(plan, model, tmp_path / "out.gguf"))
    assert stored_forms(found) == ("q3_k/q4_k/q6_k", "q2_k")
    kept = [[0, 2, 3], [1, 2, 3]]
    for layer, ids in enumerate(kept):
        for part, (name, type_name) in enumerate(
            zip(("gate", "up", "down"), split_form(stored_forms(found)[layer]), strict=True)
        ):
            info = model.tensors[f"blk.{layer}.ffn_{name}_exps.weight"]
            result = found.tensors[info.name]
            if type_name.upper() == info.type_name:
                assert content(result) == rows(info, ids)
                continue
            packed = [pack_matrix(type_name, model.expert(layer, e)[part]).tobytes() for e in ids]
            assert content(result) == b"".join(packed)
    assert content(found.tensors["blk.1.ffn_gate_inp.weight"]) == rows(
        model.tensors["blk.1.ffn_gate_inp.weight"], [1, 2, 3]
    )


def test_an_importance_matrix_is_used_column_by_column(tmp_path: Path) -> None:
    model = GgufModel(write_moe(tmp_path / "m.gguf", types=("Q8_0",) * 3))
    plan = hand_plan(model, [["q4_k"] * 4] * 2, "gguf")
    options = CalibrationOptions(
        tasks=("code",), window_tokens=1, max_windows=1, forms=("q4_k",), quantiser="imatrix"
    )
    plan = plan.model_copy(update={"calibration": options})
    with pytest.raises(InputError, match="give their folder with --stats"):
        slice_gguf(plan, model, tmp_path / "none.gguf")
    assert not list(tmp_path.glob("*none*"))
    random = np.random.default_rng(4)
    squares = {
        (layer, e, d): random.uniform(0, 9, 256)
        for layer in (0, 1)
        for e in range(4)
        for d in (0, 1)
    }
    path = slice_gguf(
        plan, model, tmp_path / "out.gguf", lambda layer, e, is_down: squares[layer, e, is_down]
    )
    found = GgufModel(path)
    weights = model.expert(1, 3)[2]
    wanted = pack_matrix("q4_k", weights, quantiser="imatrix", input_squares=squares[1, 3, 1])
    assert rows(found.tensors["blk.1.ffn_down_exps.weight"], [3]) == wanted.tobytes()
    assert wanted.tobytes() != pack_matrix("q4_k", weights).tobytes()


def test_the_calibrations_moments_are_used(tmp_path: Path) -> None:
    model = GgufModel(write_moe(tmp_path / "m.gguf", types=("Q8_0",) * 3))
    stats = fake_stats(model, (DROP, "q4_k"))
    folder = tmp_path / "stats"
    stats.save(folder)
    random = np.random.default_rng(5)
    for layer in (0, 1):
        moments = LayerMoments.zeros_of(model.spec)
        moments.input_squares.add(random.uniform(0, 9, (4, 256)))
        moments.inner_squares.add(random.uniform(0, 9, (4, 256)))
        moments.save(moments_path(folder, layer))
    options = CalibrationOptions(
        tasks=("code",), window_tokens=1, max_windows=1, forms=("q4_k",), quantiser="imatrix"
    )
    changes = {"calibration": options, "stats_fingerprint": stats_fingerprint(stats)}
    plan = hand_plan(model, [["q4_k"] * 4] * 2, "gguf").model_copy(update=changes)
    output = build(plan, tmp_path / "out", stats=folder) / GGUF_NAME
    found = GgufModel(output)
    inner = LayerMoments.load(moments_path(folder, 1)).inner_squares.values()[2]
    wanted = pack_matrix("q4_k", model.expert(1, 2)[2], quantiser="imatrix", input_squares=inner)
    assert rows(found.tensors["blk.1.ffn_down_exps.weight"], [2]) == wanted.tobytes()
    other = plan.model_copy(update={"stats_fingerprint": "0" * 64})
    with pytest.raises(PlanError, match="made with other statistics"):
        build(other, tmp_path / "other", stats=folder)
    hessian = options.model_copy(update={"quantiser": "gptq_refit"})
    with pytest.raises(TargetError, match="other types.*--quantiser imatrix or nearest"):
        build(plan.model_copy(update={"calibration": hessian}), tmp_path / "x", stats=folder)
    kept = keep_all(model).model_copy(update={"calibration": hessian})
    build(kept, tmp_path / "kept")  # nothing is packed: nothing is needed


def test_scales_stay_apart_from_weights_that_are_packed_anew(tmp_path: Path) -> None:
    scales = np.array([1.0, 2.0, 3.0, 4.0])
    tensors = {"blk.0.ffn_down_exps.scale": scales}
    model = GgufModel(write_moe(tmp_path / "m.gguf", types=("Q8_0",) * 3, tensors=tensors))
    plan = hand_plan(model, [[DROP, "q6_k", "q6_k", "q6_k"]] * 2, "gguf")
    found = GgufModel(slice_gguf(plan, model, tmp_path / "out.gguf"))
    before, after = model.expert(0, 2)[2], found.expert(0, 1)[2]
    assert np.abs(before - after).max() < 0.05 * np.abs(before).max()


def test_the_file_type_is_that_of_most_experts(tmp_path: Path) -> None:
    path = write_moe(tmp_path / "m.gguf", types=("Q8_0",) * 3, file_type=7)
    model = GgufModel(path)
    plan = hand_plan(model, [["q4_k"] * 4] * 2, "gguf")
    found = GgufModel(slice_gguf(plan, model, tmp_path / "out.gguf"))
    assert found.header.metadata["general.file_type"] == 15
    kept = GgufModel(slice_gguf(keep_all(model), model, tmp_path / "kept.gguf"))
    assert kept.header.metadata["general.file_type"] == 7
    plain = GgufModel(write_moe(tmp_path / "plain.gguf", types=("Q8_0",) * 3))
    plan = hand_plan(plain, [["q4_k"] * 4] * 2, "gguf")
    found = GgufModel(slice_gguf(plan, plain, tmp_path / "plain-out.gguf"))
    assert "general.file_type" not in found.header.metadata  # nothing is made up


@pytest.mark.parametrize(
    ("label", "wanted"),
    [("4x7B", "3x7B"), ("4x128x7B", "3x128x7B"), ("8x7B", None), ("30B-A3B", None), (None, None)],
)
def test_the_size_label_counts_the_kept_experts(
    label: str | None, wanted: str | None, tmp_path: Path
) -> None:
    model = GgufModel(write_moe(tmp_path / "m.gguf", size_label=label))
    whole = GgufModel(slice_gguf(keep_all(model), model, tmp_path / "whole.gguf"))
    assert whole.header.metadata.get("general.size_label") == label
    found = GgufModel(slice_gguf(stored_plan(model, [[0, 1, 3]] * 2), model, tmp_path / "o.gguf"))
    assert found.header.metadata.get("general.size_label") == wanted


# ---------------------------------------------------------------------------- groups and MTP


def test_groups_keep_equal_counts(tmp_path: Path) -> None:
    keys = {"expert_group_count": 2, "expert_group_used_count": 1}
    path = write_moe(
        tmp_path / "m.gguf", "deepseek2", types=F32, width=32, num_experts=8, keys=keys
    )
    model = GgufModel(path)
    found = GgufModel(
        slice_gguf(stored_plan(model, [[0, 2, 5, 7], [1, 3, 4, 6]]), model, tmp_path / "o.gguf")
    )
    assert (found.spec.num_experts, found.spec.router.num_groups) == (4, 2)
    with pytest.raises(TargetError, match=r"plan keeps \[3, 1\] in layer 1: plan again"):
        slice_gguf(stored_plan(model, [[0, 2, 5, 7], [1, 2, 3, 6]]), model, tmp_path / "x.gguf")


def test_open_groups_hold_top_k_experts(tmp_path: Path) -> None:
    """Of 4 groups one is open, where a token needs 4 experts: 2 in each are too few."""
    keys = {"expert_group_count": 4, "expert_group_used_count": 1}
    path = write_moe(
        tmp_path / "m.gguf", "deepseek2", types=F32, width=32, num_experts=16, top_k=4, keys=keys
    )
    kept = [expert_id for expert_id in range(16) if expert_id % 4 < 2]
    model = GgufModel(path)
    with pytest.raises(TargetError, match="1 groups hold fewer than top_k=4"):
        slice_gguf(stored_plan(model, [kept] * 2), model, tmp_path / "o.gguf")
    assert not (tmp_path / "o.gguf").exists()


def test_layers_for_multi_token_prediction_shrink_too(tmp_path: Path) -> None:
    path = write_moe(
        tmp_path / "m.gguf", "glm4moe", types=F32, width=32, num_layers=3,
        keys={"nextn_predict_layers": 1},
    )  # fmt: skip
    model = GgufModel(path)
    found = GgufModel(
        slice_gguf(stored_plan(model, [[1, 3], [0, 2]]), model, tmp_path / "out.gguf")
    )
    name = "blk.2.ffn_up_exps.weight"
    assert content(found.tensors[name]) == rows(model.tensors[name], [0, 1])


# ---------------------------------------------------------------------------- refusals


def _plan_of(model: GgufModel, *forms: list[str]) -> Plan:
    return hand_plan(model, list(forms), "gguf")


def test_plans_that_one_file_cannot_hold(tmp_path: Path) -> None:
    model = GgufModel(write_moe(tmp_path / "m.gguf"))
    whole = ["q4_k/q4_k/q6_k"] * 4
    bad = {
        "layer 1 keeps 4 experts and layer 0 keeps 3": ([DROP, *whole[1:]], whole),
        "layer 0 mixes the forms q2_k, q3_k": (["q2_k", "q3_k", "q3_k", "q3_k"], whole),
        "cannot pack iq4_xs": (["iq4_xs"] * 4, whole),
        "cannot pack q5_0": (["q4_k/q4_k/q5_0"] * 4, whole),
    }
    for message, forms in bad.items():
        with pytest.raises(TargetError, match=message):
            slice_gguf(_plan_of(model, *forms), model, tmp_path / "out.gguf")
    merged = GgufModel(write_moe(tmp_path / "merged.gguf", merged=True))
    with pytest.raises(TargetError, match="holds gate and up in one tensor"):
        slice_gguf(_plan_of(merged, ["q3_k/q4_k/q6_k"] * 4, whole), merged, tmp_path / "out.gguf")
    assert {p.name for p in tmp_path.iterdir()} == {"m.gguf", "merged.gguf"}


def test_a_full_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GgufModel(write_moe(tmp_path / "m.gguf", types=F32, width=32))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskSpaceError, match="GGUF file out.gguf needs"):
        slice_gguf(keep_all(model), model, tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_source_that_shrinks_leaves_no_output(tmp_path: Path) -> None:
    path = write_moe(tmp_path / "m.gguf", types=F32, width=32)
    model = GgufModel(path)
    plan = keep_all(model)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="ended early"):
        slice_gguf(plan, model, tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@needs_proc
@pytest.mark.parametrize("way", ["_in_kernel", "_by_buffer"])
def test_memory_does_not_grow_with_the_file(way: str, tmp_path: Path) -> None:
    path = synthetic_gguf(tmp_path / "m.gguf", 120_000_000)
    model = GgufModel(path)
    kept = [list(range(0, 128, 2))] * model.spec.num_moe_layers
    plan_path = tmp_path / "plan.json"
    stored_plan(model, kept).save(plan_path)
    imports = """
import sys
from pathlib import Path
from edge_moe.converters import copy_range
from edge_moe.converters.slice_gguf import slice_gguf
from edge_moe.gguf_model import GgufModel
from edge_moe.plan import Plan
plan, model = Plan.load(Path(sys.argv[1])), GgufModel(Path(sys.argv[2]))
def refuse(*_):
    raise OSError(18, "another device")
if sys.argv[4] == "_by_buffer":
    copy_range._in_kernel = copy_range._send = refuse
"""
    work = "slice_gguf(plan, model, Path(sys.argv[3]))"
    peak = measure_peak(imports, work, plan_path, path, tmp_path / "out.gguf", way)
    assert (tmp_path / "out.gguf").stat().st_size > 50_000_000
    assert peak.grown_bytes < (30_000_000 if way == "_by_buffer" else 16_000_000)


# ---------------------------------------------------------------------------- build


def test_build_takes_the_file(tmp_path: Path) -> None:
    path = write_moe(tmp_path / "m.gguf", licence="apache-2.0")
    model = GgufModel(path)
    plan = stored_plan(model, [[0, 1, 2], [1, 2, 3]])
    output = build(plan, tmp_path / "out")
    assert {p.name for p in output.iterdir()} == {GGUF_NAME, "README.md", "plan.json"}
    assert GgufModel(output / GGUF_NAME).spec.num_experts == 3
    card = (output / "README.md").read_text()
    assert "Every layer keeps 3 of its 4 experts" in card
    assert "base_model" not in card and 'license: "apache-2.0"\n' in card
    other = write_moe(tmp_path / "other.gguf", seed=5)
    with pytest.raises(PlanError, match="has the fingerprint"):
        build(plan, tmp_path / "wrong", model=other)
    with pytest.raises(TargetError, match="can only be built as GGUF, not as native"):
        build(plan, tmp_path / "wrong", target="native")
    assert not (tmp_path / "wrong").exists()


def test_the_card_names_the_repository_that_the_file_states(tmp_path: Path) -> None:
    url = "https://huggingface.co/Qwen/Qwen3-30B-A3B"
    path = write_moe(tmp_path / "M.GGUF", repo_url=url)  # some spell it so
    plan = stored_plan(GgufModel(path), [[0, 1, 2], [1, 2, 3]])
    card = (build(plan, tmp_path / "out") / "README.md").read_text()
    assert card.startswith(
        '---\nbase_model: "Qwen/Qwen3-30B-A3B"\nbase_model_relation: quantized\n'
    )


def test_statistics_are_for_gguf_files_alone(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("olmoe"))
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 4), "gguf")
    with pytest.raises(InputError, match="--stats is for a .gguf model"):
        build(plan, tmp_path / "out", model=checkpoint.folder, stats=tmp_path)
    assert not (tmp_path / "out").exists()
