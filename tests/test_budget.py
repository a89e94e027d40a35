"""The memory bill, worked out by hand for small shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyCheckpoint, make_tiny_checkpoint

from edge_moe.budget import (
    ALLOCATOR_BYTES,
    GGUF_RUNTIME_BYTES,
    GRAPH_BYTES,
    demand_readers,
    dense_bytes,
    describe_terms,
    llama_compute_bytes,
    memory_terms,
    minimum_budget_bytes,
    non_expert_bytes,
    reading_threads,
    workspace_bytes,
)
from edge_moe.checkpoint import Checkpoint
from edge_moe.minimal_model import minimal_config
from edge_moe.onnx_workspace import onnx_workspace_values
from edge_moe.plan import Device, MemoryTerm, Target
from edge_moe.spec import ModelSpec


def small_spec(**changes: Any) -> ModelSpec:
    """3 layers, 4 experts of 64 x 32, 2 heads with one KV head of width 8."""
    config: dict[str, Any] = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "vocab_size": 100,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 1000,
        "dtype": "bfloat16",
    }
    return ModelSpec.from_config(config | changes)


def terms(
    target: Target = "native", device: Device = "cpu", **changes: Any
) -> dict[str, MemoryTerm]:
    arguments: dict[str, Any] = {
        "forms": [["bf16", "drop", "q8_0", "q4_0"]] * 3,
        "dense_bytes": 5000,
        "context_tokens": 10,
        "runtime_bytes": 77,
        "runtime_source": "measured",
    }
    bill = memory_terms(small_spec(), target=target, device=device, **(arguments | changes))
    return {term.name: term for term in bill}


def test_the_terms_have_their_names_in_order() -> None:
    assert list(terms()) == ["dense weights", "experts", "KV cache", "workspace", "runtime"]


def test_experts_by_hand() -> None:
    weights = 3 * 64 * 32
    per_layer = weights * 2 + weights // 32 * 34 + weights // 32 * 18
    assert terms()["experts"].num_bytes == 3 * per_layer
    assert terms(forms=[])["experts"].num_bytes == 0


@pytest.mark.parametrize(
    ("target", "device", "itemsize_bytes"),
    [("native", "cpu", 4), ("native", "cuda", 2), ("gguf", "cpu", 2), ("hf", "cpu", 2)],
)
def test_kv_cache_by_hand(target: Target, device: Device, itemsize_bytes: int) -> None:
    keys_and_values = 8 + 8
    expected = 10 * 3 * keys_and_values * itemsize_bytes
    assert terms(target, device)["KV cache"].num_bytes == expected


def test_runtime_is_measured_natively_and_assumed_for_llama() -> None:
    assert terms()["runtime"] == MemoryTerm(name="runtime", num_bytes=77, source="measured")
    assumed = terms("gguf")["runtime"]
    assert (assumed.num_bytes, assumed.source) == (GGUF_RUNTIME_BYTES, "assumed")


def test_workspace_by_hand() -> None:
    # 10 tokens: residual stream and norm 2 x 64, logits 100; an expert of 3 x 64 x 32 weights and
    # codes, its tokens 3 x 64 + 3 x 32 + 4; six bounce buffers of one expert at 16 bits
    always, rest = 10 * 2 * 64 + 100, 6 * 2 * 3 * 64 * 32 + ALLOCATOR_BYTES
    experts = 3 * 64 * 32 * 7 // 6 + 10 * (3 * 64 + 3 * 32 + 4)
    assert workspace_bytes(small_spec(), 10, "cpu") == 4 * (always + experts) + rest
    # 256 tokens of 900: queries and output 2 x 16 + 64, keys and values 8 + 8, masks 5 bytes
    always = 256 * 2 * 64 + 100
    attention = 256 * (2 * 16 + 64 + 8 + 8) + 256 * 900 * 5 // 4
    long = workspace_bytes(small_spec(), 900, "cpu")
    assert long == 4 * (always + attention) + rest
    assert workspace_bytes(small_spec(), 900, "cpu", 256) == long + 4 * 255 * 100
    repeated = 4 * 2 * 900 * 16  # keys and values of the whole context for every query head
    assert workspace_bytes(small_spec(), 900, "cuda") == long + repeated + GRAPH_BYTES
    whole = small_spec(num_key_value_heads=2)
    assert workspace_bytes(whole, 900, "cuda") == workspace_bytes(whole, 900, "cpu") + GRAPH_BYTES


def test_large_experts_are_read_one_by_one() -> None:
    # at 16 bits 6 x 1024 x I bytes; 32 MiB may be on their way
    for width, readers in ((64, 4), (1365, 4), (1366, 3), (2730, 2), (2731, 0), (14336, 0)):
        spec = small_spec(hidden_size=1024, moe_intermediate_size=width)
        assert (demand_readers(spec), reading_threads(spec)) == (readers, readers + 2)


def test_onnx_caches_latent_attention_expanded() -> None:
    latent = {"model_type": "deepseek_v3", "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    widths = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 6}
    spec = small_spec(**latent, **widths, first_k_dense_replace=0)
    found = {
        target: memory_terms(
            spec, forms=[], dense_bytes=0, context_tokens=10, device="cpu", target=target,
            runtime_bytes=0, runtime_source="assumed",
        )[2].num_bytes
        for target in ("native", "onnx")
    }  # fmt: skip
    assert found["native"] == 10 * 3 * (6 + 4) * 4
    assert found["onnx"] == 10 * 3 * 2 * (2 * 12) * 4  # two heads of 12, values padded to them


def test_latent_attention_holds_its_scores() -> None:
    latent = {"model_type": "deepseek_v3", "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    widths = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 6}
    spec = small_spec(**latent, **widths, first_k_dense_replace=0)
    assert spec.kv_bytes_per_token(4) == 4 * 3 * (6 + 4)
    attention = 256 * (2 * 2 * 12 + 64 + 6 + 4) + 256 * 900 * 5 // 4
    attention += 256 * 900 * 2 * 12 // 5 + 900 * 2 * ((8 + 8) + (8 + 4))
    always, rest = 256 * 2 * 64 + 100, 6 * 2 * 3 * 64 * 32 + ALLOCATOR_BYTES
    assert workspace_bytes(spec, 900, "cpu") == 4 * (always + attention) + rest


def test_onnx_workspace_by_hand() -> None:
    """256 tokens of 900; queries 2 x 8, keys and values 8 + 8, experts of 64 x 32 on 3 threads."""
    spec = small_spec()
    assert onnx_values(spec) == (
        2 * 256 * 64 + 100  # residual stream, logits
        + 256 * (6 * 16 + 3 * 16 + 64)
        + 3 * 256 * 3 * (64 + 32) + 2 * 3 * 64 * 32 + 256 * 4
    )  # fmt: skip
    sinks = replace(spec, holds_scores=True)
    assert onnx_values(sinks) == onnx_values(spec) + 2 * 2 * 256 * 900
    latent = replace(spec, expanded_kv_width=50)  # keys and values as wide as queries
    assert onnx_values(latent) == onnx_values(spec) + 256 * (3 * (2 * 16 - 16) + 50)
    branches = replace(spec, hidden_act="gelu")
    less = 2 * 256 * 3 * (64 + 32) + 2 * 3 * 64 * 32
    assert onnx_values(branches) == onnx_values(spec) - less


def onnx_values(spec: ModelSpec) -> int:
    return onnx_workspace_values(
        spec, tokens=256, context_tokens=900, scored_tokens=1, num_threads=3
    )


def test_onnx_computes_mamba_token_by_token() -> None:
    """Of 30 x 64 = 1920 values and 2 x 8 x 128 of B and C; torch holds 72,000 per token more."""
    changes = {
        "mamba_num_heads": 30,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "n_groups": 8,
        "moe_latent_size": 32,
    }
    config = {"model_type": "nemotron_h", **minimal_config("nemotron_h"), **changes}
    spec = ModelSpec.from_config(config)
    assert spec.onnx_state_workspace == 6 * (1920 + 2 * 8 * 128)
    assert spec.state_workspace > 2 * spec.onnx_state_workspace
    without = replace(spec, onnx_state_workspace=0)
    attention = 6 * spec.query_width + 3 * 2 * spec.kv_key_width + spec.hidden_size
    more = 256 * (spec.onnx_state_workspace - attention)
    assert onnx_values(spec) - onnx_values(without) == more > 0


def test_onnx_caches_no_windows() -> None:
    changes: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention"] * 3}
    spec = small_spec(model_type="gpt_oss", intermediate_size=32, **changes)
    assert spec.num_sliding_layers == 3
    bill = {
        target: memory_terms(
            spec, forms=[], dense_bytes=0, context_tokens=10, device="cpu", target=target,
            runtime_bytes=0, runtime_source="assumed",
        )[2]
        for target in ("native", "onnx")
    }  # fmt: skip
    assert bill["onnx"].num_bytes * 4 == bill["native"].num_bytes * 10
    assert "sliding layers hold the whole context" in bill["onnx"].note
    assert "sliding" not in bill["native"].note


def test_llama_compute_buffer_is_the_larger_moment() -> None:
    assert llama_compute_bytes(small_spec(), 10) == 4 * 10 * (3 * 64 + 2 * 10)  # attention
    assert llama_compute_bytes(small_spec(vocab_size=9000), 600) == 4 * 512 * (9000 + 64)


def test_dense_bytes_counts_every_other_weight_once(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe"))
    embeddings = 2 * 320 * 64
    attention = 64 * 4 * 32 * 2 + 2 * 64 * 2 * 32
    norms = 2 * 64 + 2 * 32
    router = 8 * 64
    vectors = 2 * norms + 64
    weights = embeddings + 2 * (attention + router) + vectors
    assert dense_bytes(checkpoint, "cpu", "native") == 4 * weights
    assert dense_bytes(checkpoint, "cuda", "native") == 2 * weights
    assert dense_bytes(checkpoint, "cpu", "hf") == 2 * weights
    assert dense_bytes(checkpoint, "cpu", "gguf") == 2 * weights + 2 * (vectors + 2 * router)


def test_a_tied_head_is_counted_once(tmp_path: Path, tiny_checkpoint: TinyCheckpoint) -> None:
    tied = make_tiny_checkpoint(tmp_path / "tied", "qwen3_moe", tie_word_embeddings=True)
    untied = Checkpoint(tiny_checkpoint("qwen3_moe"))
    difference = dense_bytes(untied, "cuda", "native") - dense_bytes(
        Checkpoint(tied), "cuda", "native"
    )
    assert difference == 2 * 320 * 64


def test_minimum_budget_adds_the_cheapest_experts() -> None:
    bill = list(terms().values())
    assert non_expert_bytes(bill) == sum(t.num_bytes for t in bill) - terms()["experts"].num_bytes
    assert minimum_budget_bytes(bill, 123) == non_expert_bytes(bill) + 123
    assert describe_terms(bill[:1]) == "dense weights 5.00 kB"
