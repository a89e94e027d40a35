"""Hugging Face output: loads in transformers without a missing key, computes what the plan says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import FAMILY_NAMES, TinyCheckpoint, make_tiny_checkpoint
from hand_plan import fused_copy, hand_plan, tree, uniform_forms
from hypothesis import given
from hypothesis import strategies as st
from masked_routing import mask_routers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.export_hf import check_hf, export_hf
from edge_moe.converters.model_card import base_model
from edge_moe.converters.sidecar import add_older_rope_keys, patch_expert_count
from edge_moe.converters.staging import build_folder
from edge_moe.errors import TargetError
from edge_moe.families import FAMILIES
from edge_moe.spec import ModelSpec

TOKENS = torch.arange(3, 35).reshape(2, 16)


def load(folder: Path) -> nn.Module:
    pair: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model, info = pair
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded: nn.Module = model.eval()
    return loaded


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(TOKENS).logits
    return result


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("stacked", [False, True])
def test_logits_are_those_of_the_source_with_masked_routers(
    family: str, stacked: bool, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(family)
    if stacked:
        folder = fused_copy(folder, tmp_path / "fused")
    checkpoint = Checkpoint(folder)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 4), "hf")
    output = build(plan, tmp_path / "out", model=checkpoint.folder)
    source = load(tiny_checkpoint(family))
    mask_routers(source, plan, checkpoint.spec)
    smaller = load(output)
    torch.testing.assert_close(logits(smaller), logits(source), atol=2e-5, rtol=1e-4)
    assert Checkpoint(output).spec.num_experts == 4


def test_keeping_everything_changes_no_weight(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("qwen2_moe")
    checkpoint = Checkpoint(folder)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8), "hf")
    output = build(plan, tmp_path / "out", model=folder)
    found, source = tree(output), tree(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert found[name] == source[name]
    config = source["config.json"].decode()
    assert found["config.json"].decode() == add_older_rope_keys(config, checkpoint.spec)
    assert sorted(Checkpoint(output).tensors) == sorted(checkpoint.tensors)
    for name in checkpoint.tensors:
        assert Checkpoint(output).read_raw(name) == checkpoint.read_raw(name)


def test_what_a_published_folder_needs_is_there(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_checkpoint("gpt_oss"), tmp_path / "source")
    for name in ("chat_template.jinja", "LICENSE", "USAGE_POLICY", "tokenizer.model", "merges.txt"):
        (source / name).write_bytes(name.encode())
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("x")
    checkpoint = Checkpoint(source)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 4), "hf")
    found, expected = tree(build(plan, tmp_path / "out")), tree(source)
    assert "generation_config.json" in expected and "tokenizer_config.json" in expected
    changed = {"config.json", "model.safetensors"}
    assert found.keys() == expected.keys() | {"README.md", "plan.json"}
    assert all(found[name] == expected[name] for name in expected.keys() - changed)


def test_shards_and_index(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("mixtral"))
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 4), "hf")
    with build_folder(tmp_path / "out", "test") as work:
        export_hf(plan, checkpoint, work, shard_bytes=60_000)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    load(tmp_path / "out")


def test_finished_shards_are_not_written_again(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("mixtral"))
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 4), "hf")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with (
        mock.patch("edge_moe.converters.export_hf.write_index", interrupted),
        pytest.raises(KeyboardInterrupt),
    ):
        build(plan, tmp_path / "out", model=checkpoint.folder)
    with mock.patch("edge_moe.converters.shards.safetensors_file", interrupted):
        output = build(plan, tmp_path / "out", model=checkpoint.folder)
    load(output)


def test_float32_checkpoint_to_16_bit(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "source", "olmoe", dtype="float32")
    checkpoint = Checkpoint(folder)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 4, "f16"), "hf")
    output = Checkpoint(build(plan, tmp_path / "out", model=folder))
    kept = plan.kept(plan.forms[1])[2]
    for found, expected in zip(output.expert(1, 2), checkpoint.expert(1, kept), strict=True):
        np.testing.assert_array_equal(found, expected.astype(np.float16).astype(np.float32))
    name = "model.embed_tokens.weight"
    assert output.read_raw(name) == checkpoint.read_raw(name)


QWEN3 = {
    "num_hidden_layers": 1,
    "num_experts_per_tok": 2,
    "hidden_size": 8,
    "vocab_size": 9,
    "num_attention_heads": 1,
    "moe_intermediate_size": 4,
    "model_type": "qwen3_moe",
}


def _patched(text: str, num_experts: int = 4) -> str:
    return patch_expert_count(text, ModelSpec.from_config(json.loads(text)), num_experts)


def test_only_the_count_changes_in_config() -> None:
    rest = json.dumps(QWEN3)[1:]
    text = '{ "num_experts" :128,"nested": {"num_experts": 7},\r\n\t' + rest
    assert _patched(text) == text.replace(":128", ":4", 1)


def test_both_count_names_change() -> None:
    text = json.dumps({"num_local_experts": 16} | QWEN3 | {"num_experts": 16}, indent=3)
    expected = json.dumps({"num_local_experts": 4} | QWEN3 | {"num_experts": 4}, indent=3)
    assert _patched(text) == expected


def test_original_name_is_added_where_it_was_renamed() -> None:
    text = json.dumps(QWEN3 | {"num_local_experts": 16}, indent=2)
    expected = json.dumps(QWEN3 | {"num_experts": 4, "num_local_experts": 4}, indent=2)
    assert _patched(text) == expected


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner),
    max_leaves=6,
)


@given(extra=st.dictionaries(st.text(max_size=12), values), indent=st.sampled_from([None, 0, 2]))
def test_patched_config_means_the_same(extra: dict[str, object], indent: int | None) -> None:
    config = extra | QWEN3 | {"num_local_experts": 16}
    spec = ModelSpec.from_config(QWEN3 | {"num_local_experts": 16})
    patched = json.loads(patch_expert_count(json.dumps(config, indent=indent), spec, 4))
    assert patched == config | {"num_experts": 4, "num_local_experts": 4}


def _with_older_keys(config: dict[str, object], indent: int | None = None) -> dict[str, object]:
    spec = ModelSpec.from_config(QWEN3 | {"num_experts": 16})
    changed: dict[str, object] = json.loads(
        add_older_rope_keys(json.dumps(config, indent=indent), spec)
    )
    return changed


def test_rotary_values_are_repeated_where_transformers_4_looks() -> None:
    plain = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.25}
    assert _with_older_keys({"a": 1, "rope_parameters": plain}, 2) == {
        "a": 1,
        "rope_theta": 5e5,
        "partial_rotary_factor": 0.25,
        "rope_parameters": plain,
    }
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    assert _with_older_keys({"rope_parameters": yarn}) == {
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        "rope_parameters": yarn,
    }


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 1e4, "rope_scaling": None},
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        {"rope_parameters": None},
    ],
)
def test_rotary_values_that_are_there_stay(config: dict[str, object]) -> None:
    assert _with_older_keys(config) == config


COUNT_KEYS = {
    "deepseek_v2": "n_routed_experts",
    "deepseek_v3": "n_routed_experts",
    "ernie4_5_moe": "moe_num_experts",
    "gemma4_text": "num_experts",
    "glm4_moe": "n_routed_experts",
    "glm4_moe_lite": "n_routed_experts",
    "gpt_oss": "num_local_experts",
    "granitemoe": "num_local_experts",
    "lfm2_moe": "num_experts",
    "minimax_m2": "num_local_experts",
    "mixtral": "num_local_experts",
    "nemotron_h": "n_routed_experts",
    "olmoe": "num_experts",
    "phimoe": "num_local_experts",
    "qwen2_moe": "num_experts",
    "qwen3_5_moe_text": "num_experts",
    "qwen3_moe": "num_experts",
    "qwen3_next": "num_experts",
}
"""What the families' own config.json files call it: vLLM and mlx-lm look there."""
COUNT = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts")
EXPERT = re.compile(r"\.experts\.(\d+)\.")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_names_are_those_that_other_programs_read(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = Checkpoint(tiny_checkpoint(family))
    plan = hand_plan(source, uniform_forms(source, 4), "hf")
    output = Checkpoint(build(plan, tmp_path / "out"))
    before, after = (
        json.loads((folder / "config.json").read_text())
        for folder in (source.folder, output.folder)
    )
    counts = {key for key in before if COUNT.fullmatch(key)}
    assert all(after[key] == 4 for key in counts | {COUNT_KEYS[family]})
    rope = before["rope_parameters"] if "rope_parameters" in before else {}
    added = {COUNT_KEYS[family], *(rope if "rope_theta" in rope else ())} - {"rope_type"}
    assert after.keys() - before.keys() <= added
    assert all(after[key] == before[key] for key in before.keys() - counts)
    numbers = {name: EXPERT.search(name) for name in source.tensors}
    kept = {name for name, found in numbers.items() if not found or int(found.group(1)) < 4}
    assert output.tensors.keys() == kept - set(source.unused_tensors)
    assert any(numbers.values()) or kept == source.tensors.keys()


def test_plans_that_hf_cannot_express(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe"))
    uneven = [["bf16"] * 8, ["bf16"] * 4 + ["drop"] * 4]
    with pytest.raises(TargetError, match="one number of experts for all layers.*keeps 4 to 8"):
        check_hf(hand_plan(checkpoint, uneven), checkpoint.spec)
    for forms in ([["q8_0"] * 8] * 2, [["bf16", "f16"] * 4] * 2):
        with pytest.raises(TargetError, match="in one dtype, the plan uses"):
            check_hf(hand_plan(checkpoint, forms), checkpoint.spec)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ((0, 1, 2, 4), r"same number.*keeps \[3, 1\] in layer 1"),
        ((0, 4), r"at least 2.*keeps \[1, 1\]"),
    ],
)
def test_groups_stay_equal(
    kept: tuple[int, ...], message: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("deepseek_v3"))
    row = ["bf16" if index in kept else "drop" for index in range(8)]
    with pytest.raises(TargetError, match=message):
        check_hf(hand_plan(checkpoint, [row] * 2), checkpoint.spec)


def test_model_card_keeps_the_licence(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_checkpoint("qwen3_moe"), tmp_path / "source")
    (source / "README.md").write_text(
        "---\nlanguage:\n- en\n- it\nlicense: other\nlicense_name: tiny\ntags:\n- x\n---\n# Hi\n"
    )
    checkpoint = Checkpoint(source)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 4), "hf")
    plan = plan.model_copy(update={"model": "Qwen/Tiny-MoE"})
    card = (build(plan, tmp_path / "out", model=source) / "README.md").read_text()
    front = card.split("---\n")[1]
    assert 'base_model: "Qwen/Tiny-MoE"\nlanguage' in front  # the hub has no word for dropping
    assert "language:\n- en\n- it\nlicense: other\nlicense_name: tiny\nlibrary_name:" in front
    assert "- x\n" not in front
    assert "Every layer keeps 4 of its 8 experts (50% of all)." in card
    assert "| drop | 8 |" in card
    assert "edge-moe build plan.json -o out --target hf" in card
    assert "edge-moe plan Qwen/Tiny-MoE --stats stats --budget 1000000000B --ctx 256" in card
    assert str(tmp_path) not in card


def test_model_card_is_valid_yaml(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe"))
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 4), "hf")
    card = (build(plan, tmp_path / "out", model=checkpoint.folder) / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == checkpoint.folder.name
    assert front["tags"] == ["edge-moe", "moe", "mixture-of-experts", "expert-pruning", "code"]


def test_base_model_of_a_hub_cache_folder(tmp_path: Path) -> None:
    folder = tmp_path / "models--Qwen--Qwen3-30B-A3B" / "snapshots" / "abc"
    assert base_model(str(folder), folder) == "Qwen/Qwen3-30B-A3B"
    assert base_model("Qwen/Qwen3-30B-A3B", folder) == "Qwen/Qwen3-30B-A3B"
    assert base_model(str(tmp_path), tmp_path) == tmp_path.name
