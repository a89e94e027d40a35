"""Every family that llama.cpp has: its logits are those of transformers, whole and pruned.

Logits of quantised experts are compared loosely: llama.cpp rounds activations to 8 bits where they
meet a quantised matrix, and on random weights that moves a choice of experts here and there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from composites import save_composite
from conftest import make_tiny_checkpoint
from hand_plan import edit_config, hand_plan, uniform_forms
from llama_worker import ask_llama
from reference_model import masked, table_gelu
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from edge_moe.candidates import check_target, find_candidates, gguf_reason
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.export_gguf import export_gguf, gguf_source
from edge_moe.converters.export_lora_gguf import lora_name
from edge_moe.converters.gguf_families import GGUF_FAMILIES
from edge_moe.errors import TargetError
from edge_moe.families import COMPOSITES, FAMILIES
from edge_moe.formats import DROP
from edge_moe.gguf_header import GgufArray, read_gguf_header
from edge_moe.minimal_model import minimal_config
from edge_moe.spec import ModelSpec

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

FloatArray = npt.NDArray[np.float32]
IDS = [(7 * i * i + 3 * i) % 320 for i in range(64)]
"""More than a sliding window."""

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
GREEDY = {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}
"""DeepSeek-V2 without groups of experts: llama.cpp ranks them otherwise."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("deepseek_v2", GREEDY),
    "deepseek_v2 yarn": (
        "deepseek_v2",
        GREEDY
        | {"q_lora_rank": 48, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}},
    ),
    "deepseek_v3 yarn": (
        "deepseek_v3",
        {"q_lora_rank": 48, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "glm4_moe biases": (
        "glm4_moe",
        {
            "attention_bias": True,
            "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "deepseek_v2 greedy": ("deepseek_v2", {"topk_method": "greedy"}),  # beside groups
    "minimax_m2 partial": ("minimax_m2", {"rotary_dim": 16, "sliding_window": 4}),
    "gpt_oss yarn": ("gpt_oss", {"rope_parameters": YARN | {"truncate": True}}),
    "ernie4_5_moe tied": (
        "ernie4_5_moe",
        {"moe_num_shared_experts": 2, "tie_word_embeddings": True},
    ),
    "qwen2_moe tied": ("qwen2_moe", {"tie_word_embeddings": True}),
    "lfm2_moe tied": ("lfm2_moe", {"tie_word_embeddings": True}),
    "gemma4_text capped": (
        "gemma4_text",
        {"tie_word_embeddings": True, "final_logit_softcapping": 30.0},
    ),
    "nemotron_h wide": ("nemotron_h", {"moe_latent_size": None, "sliding_window": 4}),
}
PLAIN = sorted(GGUF_FAMILIES.keys() - {"deepseek_v2"})
CASES = [*PLAIN, *VARIANTS]

Source = Callable[[str], Checkpoint]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """`source(case)`: a float32 checkpoint."""

    @cache
    def build(case: str) -> Checkpoint:
        folder = tmp_path_factory.mktemp("source")
        family, config = VARIANTS.get(case, (case, {}))
        return Checkpoint(make_tiny_checkpoint(folder, family, dtype="float32", **config))

    return build


def transformers_logits(
    folder: Path, dropped: dict[int, list[int]], spec: ModelSpec, kind: Any = AutoModelForCausalLM
) -> FloatArray:
    """[T, V] of `IDS` with experts masked out."""
    with table_gelu(), torch.no_grad():
        model = kind.from_pretrained(folder, dtype=torch.float32).eval()
        with masked(model, spec, dropped):
            found: FloatArray = model(torch.tensor([IDS])).logits[0].numpy()
    return found


def without(checkpoint: Checkpoint, forms: list[list[str]]) -> dict[int, list[int]]:
    rows = zip(checkpoint.spec.moe_layer_ids, forms, strict=True)
    return {layer: [e for e, form in enumerate(row) if form == DROP] for layer, row in rows}


@pytest.mark.parametrize("num_kept", [8, 4])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(
    case: str, num_kept: int, source: Source, tmp_path: Path
) -> None:
    checkpoint = source(case)
    forms = uniform_forms(checkpoint, num_kept, "f32")
    path = export_gguf(hand_plan(checkpoint, forms, "gguf"), checkpoint, tmp_path / "model.gguf")
    dropped = without(checkpoint, forms) if num_kept < 8 else {}
    expected = transformers_logits(checkpoint.folder, dropped, checkpoint.spec)
    found = ask_llama(path, tmp_path, IDS).logits
    assert np.abs(found - expected).max() < 1e-3
    if dropped:
        whole = transformers_logits(checkpoint.folder, {}, checkpoint.spec)
        assert np.abs(found - whole).max() > 0.01  # the experts that went mattered


@pytest.mark.parametrize("case", [*PLAIN, "deepseek_v2"])
def test_quantised_experts_stay_near(case: str, source: Source, tmp_path: Path) -> None:
    checkpoint = source(case)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8, "q8_0"), "gguf")
    path = export_gguf(plan, checkpoint, tmp_path / "model.gguf")
    types = {tensor.name: tensor.type_name for tensor in read_gguf_header(path).tensors}
    assert types[f"blk.{checkpoint.spec.moe_layer_ids[0]}.ffn_down_exps.weight"] == "Q8_0"
    expected = transformers_logits(checkpoint.folder, {}, checkpoint.spec)
    assert_near(ask_llama(path, tmp_path, IDS).logits, expected)


def assert_near(found: FloatArray, expected: FloatArray) -> None:
    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert np.median(errors) < 0.12


@pytest.mark.parametrize("family", sorted(COMPOSITES))
def test_the_language_model_of_a_larger_one(family: str, source: Source, tmp_path: Path) -> None:
    save_composite(tmp_path, family, source(COMPOSITES[family]).folder, deviation=0.1)
    checkpoint = Checkpoint(tmp_path)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8, "f32"), "gguf")
    path = export_gguf(plan, checkpoint, tmp_path / "model.gguf")
    expected = transformers_logits(tmp_path, {}, checkpoint.spec, AutoModelForImageTextToText)
    assert np.abs(ask_llama(path, tmp_path, IDS).logits - expected).max() < 1e-3


@pytest.mark.parametrize("case", [*PLAIN, "deepseek_v2"])
def test_a_bfloat16_checkpoint_keeps_its_matrices(case: str, tmp_path: Path) -> None:
    """Every name and shape of the float32 export, matrices in bfloat16 where llama.cpp has them."""
    family, config = VARIANTS.get(case, (case, {}))
    folder = make_tiny_checkpoint(tmp_path / "source", family, **config)
    checkpoint = Checkpoint(folder)
    types = {}
    for form in ("bf16", "f32"):
        plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8, form), "gguf")
        header = read_gguf_header(export_gguf(plan, checkpoint, tmp_path / f"{form}.gguf"))
        types[form] = {t.name: (t.shape, t.type_name) for t in header.tensors}
    assert {name: shape for name, (shape, _) in types["bf16"].items()} == {
        name: shape for name, (shape, _) in types["f32"].items()
    }
    assert {kind for _, kind in types["f32"].values()} == {"F32"}
    in_float32 = {
        n for n, (shape, kind) in types["bf16"].items() if kind == "F32" and len(shape) > 1
    }
    small = ("ffn_gate_inp", "conv", "ssm_a", "ssm_d", "ssm_norm", "exps.bias")
    assert all(any(part in name for part in small) for name in in_float32)
    expected = transformers_logits(folder, {}, checkpoint.spec)
    assert_near(ask_llama(tmp_path / "bf16.gguf", tmp_path, IDS).logits, expected)


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_exported_or_refused_with_a_reason(family: str) -> None:
    spec = ModelSpec.from_config({"model_type": family, **minimal_config(family)})
    reason = gguf_reason(spec)
    wanted = {
        "phimoe": "llama.cpp's phimoe weighs experts by a softmax, this model by sparsemixer",
        "deepseek_v2": "llama.cpp's deepseek2 ranks groups of experts by their two best scores, "
        "this checkpoint by the best",
    }
    assert reason == wanted.get(family)
    assert (family in GGUF_FAMILIES) == (FAMILIES[family].gguf_arch is not None)
    if reason is None:
        check_target(spec, "gguf")
    else:
        with pytest.raises(TargetError, match="use --target native"):
            check_target(spec, "gguf")


def test_what_llama_cpp_computes_otherwise_is_a_limit() -> None:
    for family, word in (("gpt_oss", "yarn"), ("gemma4_text", "GELU")):
        spec = ModelSpec.from_config({"model_type": family, **minimal_config(family)})
        assert any(word in sentence for sentence in find_candidates(spec, "gguf").limits)
        assert not any(word in sentence for sentence in find_candidates(spec, "native").limits)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("mixtral", {"sliding_window": 64}, "has no sliding_window=64"),
        ("mixtral", {"head_dim": 32, "hidden_act": "gelu"}, "has no hidden_act='gelu'"),
        ("lfm2_moe", {"norm_topk_prob": False}, "always has norm_topk_prob=True"),
        ("lfm2_moe", {"routed_scaling_factor": 2.0}, "has no routed_scaling_factor=2"),
        ("deepseek_v3 yarn", {"rope_interleave": False}, "has no rope_interleave=False"),
        (
            "deepseek_v3 yarn",
            {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
            "has no rope_parameters.mscale=1.0 beside mscale_all_dim=0.5",
        ),
        (
            "gpt_oss",
            {"rope_parameters": YARN | {"beta_fast": 16}},
            "has no rope_parameters.beta_fast=16",
        ),
        ("gpt_oss", {"swiglu_limit": 5.0}, "has no swiglu_limit=5.0"),
        ("qwen3_next", {"linear_key_head_dim": 8}, "has no linear_key_head_dim=8 beside"),
        ("gemma4_text", {"hidden_activation": "silu"}, "has no hidden_activation='silu'"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "has no mlp_hidden_act='silu'"),
    ],
)
def test_refuses_what_the_graph_does_not_compute(
    case: str, changes: dict[str, Any], message: str, source: Source, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(source(case).folder, folder)
    edit_config(folder, **changes)
    checkpoint = Checkpoint(folder)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8))
    with pytest.raises(TargetError, match=message):
        export_gguf(plan, checkpoint, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_refuses_groups_that_llama_cpp_would_cut_elsewhere(source: Source, tmp_path: Path) -> None:
    checkpoint = source("deepseek_v3")
    for kept, counts in (([0, 1, 2, 4], "3, 1"), ([0, 4], "1, 1")):
        row = ["f32" if e in kept else DROP for e in range(8)]
        plan = hand_plan(checkpoint, [row] * 2, "gguf")
        with pytest.raises(TargetError, match=rf"keeps \[{counts}\] in layer 1"):
            export_gguf(plan, checkpoint, tmp_path / "model.gguf")


def test_an_unknown_tensor_is_named(source: Source) -> None:
    spec = source("mixtral").spec
    with pytest.raises(
        TargetError, match=r"no place for tensor 'model\.layers\.0\.self_attn\.rope"
    ):
        GGUF_FAMILIES["mixtral"].rule(spec, "model.layers.0.self_attn.rope.weight")


def test_a_lora_of_rearranged_rows_is_refused(source: Source) -> None:
    spec = source("mixtral").spec
    assert lora_name(spec, "model.layers.1.self_attn.o_proj.weight") == "blk.1.attn_output.weight"
    with pytest.raises(TargetError, match="does not rearrange what recovery changed"):
        lora_name(spec, "model.layers.1.self_attn.q_proj.weight")


# ---------------------------------------------------------------------------- provenance

CARD = """---
license: other
license_name: "tiny licence"
license_link: https://example.org/licence
language:
- en
- de
base_model: someone/else
---
# A card
"""


def test_the_file_says_where_it_comes_from(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--tiny" / "snapshots" / "abc"
    shutil.copytree(source("qwen2_moe").folder, folder)
    (folder / "README.md").write_text(CARD)
    checkpoint = Checkpoint(folder)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8, "q8_0"), "gguf")
    header = read_gguf_header(export_gguf(plan, checkpoint, tmp_path / "model.gguf"))
    expected = {
        "general.license": "other",
        "general.license.name": "tiny licence",
        "general.license.link": "https://example.org/licence",
        "general.quantized_by": "edge-moe",
        "general.base_model.count": 1,
        "general.base_model.0.name": "tiny",
        "general.base_model.0.organization": "owner",
        "general.base_model.0.repo_url": "https://huggingface.co/owner/tiny",
        "general.source.repo_url": "https://huggingface.co/owner/tiny",
        "general.file_type": 7,
        "edge_moe.source_fingerprint": checkpoint.fingerprint,
    }
    assert {key: header.metadata[key] for key in expected} == expected
    languages = header.metadata["general.languages"]
    assert isinstance(languages, GgufArray) and languages.count == 2


def test_nothing_is_said_that_nobody_stated(source: Source, tmp_path: Path) -> None:
    checkpoint = source("qwen2_moe")
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8, "q8_0"), "gguf")
    metadata = read_gguf_header(export_gguf(plan, checkpoint, tmp_path / "m.gguf")).metadata
    assert metadata["general.base_model.0.name"] == checkpoint.folder.name
    for key in ("license", "languages", "source.url", "base_model.0.repo_url"):
        assert f"general.{key}" not in metadata


def test_older_files_do_not_list_their_layers(tmp_path: Path) -> None:
    layers = ["linear_attention"] * 3 + ["full_attention"]
    folder = make_tiny_checkpoint(
        tmp_path / "old", "qwen3_next", dtype="float32", layer_types=layers
    )
    expected = transformers_logits(folder, {}, Checkpoint(folder).spec)
    edit_config(folder, layer_types=None, full_attention_interval=4)
    checkpoint = Checkpoint(folder)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8, "f32"), "gguf")
    path = export_gguf(plan, checkpoint, tmp_path / "model.gguf")
    assert np.abs(ask_llama(path, tmp_path, IDS).logits - expected).max() < 1e-3


def test_keys_are_computed_from_defaults_too(source: Source, tmp_path: Path) -> None:
    """A config.json that leaves out what transformers knows."""
    folder = tmp_path / "short"
    shutil.copytree(source("qwen2_moe").folder, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("use_sliding_window") is False
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(folder)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8, "f32"), "gguf")
    assert gguf_source(checkpoint, 8).config["shared_expert_intermediate_size"] == 96
    assert export_gguf(plan, checkpoint, tmp_path / "model.gguf").is_file()
