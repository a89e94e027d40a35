"""Which forms are on offer, and the sentences about those that are not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edge_moe.budget import resident_expert_bytes
from edge_moe.candidates import candidate_forms, find_candidates, stored_expert_bytes
from edge_moe.errors import TargetError
from edge_moe.spec import ModelSpec


def spec(
    model_type: str = "qwen3_moe", hidden: int = 256, width: int = 256, dtype: str = "bfloat16"
) -> ModelSpec:
    config = {
        "model_type": model_type,
        "num_hidden_layers": 2,
        "num_experts": 8,
        "num_local_experts": 8,
        "n_routed_experts": 8,
        "first_k_dense_replace": 0,
        "num_experts_per_tok": 2,
        "hidden_size": hidden,
        "moe_intermediate_size": width,
        "intermediate_size": width,
        "vocab_size": 100,
        "num_attention_heads": 2,
        "norm_topk_prob": model_type != "olmoe",
        "dtype": dtype,
    }
    return ModelSpec.from_config(config)


def test_one_form_per_class_of_bits() -> None:
    wide = find_candidates(spec(), "native")
    packed = ("tq1_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0")
    assert wide.forms == ("drop", *packed, "bf16")
    assert wide.limits == ()


def test_measured_forms_stand_in_for_the_preferred_of_their_class() -> None:
    measured = ("drop", "tq2_0", "q2_0", "q2_k", "q4_0", "q8_0")
    found = find_candidates(spec(), "native", measured=measured)
    assert found.forms == (
        "drop",
        "tq2_0",
        "q2_0",
        "q2_k",
        "q3_k",
        "q4_0",
        "q5_k",
        "q6_k",
        "q8_0",
        "bf16",
    )
    assert found.limits == ()
    narrow = find_candidates(spec(hidden=64, width=64), "native", measured=measured)
    assert narrow.forms == find_candidates(spec(hidden=64, width=64), "native").forms
    on_cuda = find_candidates(spec(), "gguf", "cuda", measured)
    assert "tq2_0" not in on_cuda.forms and "q2_0" in on_cuda.forms


def test_rows_that_are_no_multiple_of_256() -> None:
    found = find_candidates(spec(hidden=64, width=64), "native")
    assert found.forms == ("drop", "q2_0", "q4_0", "q8_0", "bf16")
    assert "q3_k packs rows of 256; expert rows are 64 and 64: not offered." in found.limits
    assert "q2_k packs rows of 256; expert rows are 64 and 64: 2-bit is stored as q2_0." in (
        found.limits
    )
    assert len(found.limits) == 6


@pytest.mark.parametrize("widths", [(256, 96), (96, 256)])
def test_both_rows_must_fit(widths: tuple[int, int]) -> None:
    assert candidate_forms(spec("qwen3_moe", *widths), "native") == ("drop", "q4_0", "q8_0", "bf16")


@pytest.mark.parametrize(
    ("dtype", "native", "hf"),
    [("bfloat16", "bf16", "bf16"), ("float16", "f16", "f16"), ("float32", "f16", "f32")],
)
def test_the_widest_form(dtype: str, native: str, hf: str) -> None:
    assert candidate_forms(spec(dtype=dtype), "native")[-1] == native
    assert candidate_forms(spec(dtype=dtype), "hf") == ("drop", hf)


def test_gguf_says_where_ternary_runs() -> None:
    on_cpu = find_candidates(spec(), "gguf", "cpu")
    assert "tq1_0" in on_cpu.forms
    assert any("no CUDA kernel for TQ1_0/TQ2_0: runs on CPU" in line for line in on_cpu.limits)
    on_cuda = find_candidates(spec(), "gguf", "cuda")
    assert "tq1_0" not in on_cuda.forms
    assert any("ternary is not offered" in line for line in on_cuda.limits)


def test_gguf_refuses_families_it_cannot_hold() -> None:
    assert candidate_forms(spec("olmoe"), "gguf")[0] == "drop"
    with pytest.raises(TargetError, match="phimoe weighs experts by a softmax"):
        candidate_forms(spec("phimoe"), "gguf")


def test_gguf_refuses_a_router_that_llama_would_change() -> None:
    known = spec()
    other = replace(known, router=replace(known.router, renormalises=False))
    with pytest.raises(TargetError, match="norm_topk_prob=True, this checkpoint has False"):
        candidate_forms(other, "gguf")


def test_onnx_offers_the_integer_forms_of_qmoe() -> None:
    found = find_candidates(spec(), "onnx")
    assert found.forms == ("drop", "int2_b64", "int4_b64", "int8_row", "f32")
    assert any("decodes more slowly" in line for line in found.limits)
    narrow = candidate_forms(spec(hidden=96, width=32), "onnx")
    assert narrow == ("drop", "int2_b32", "int4_b32", "int8_row", "f32")


def test_onnx_has_no_integer_experts_on_cuda() -> None:
    found = find_candidates(spec(), "onnx", "cuda")
    assert found.forms == ("drop", "f32")
    assert any("on the CPU only" in line for line in found.limits)


def test_onnx_refuses_activations_that_it_does_not_compute() -> None:
    with pytest.raises(TargetError, match="silu or .*, this checkpoint has relu"):
        candidate_forms(replace(spec(), hidden_act="relu"), "onnx")


def test_onnx_says_what_branches_cost() -> None:
    gelu = replace(spec(), hidden_act="gelu")
    assert any("150 kB" in line for line in find_candidates(gelu, "onnx").limits)
    assert not any("branch" in line for line in find_candidates(spec(), "onnx").limits)
    for form in ("int4_b64", "int8_row", "f32"):
        more = resident_expert_bytes(gelu, form, "onnx") - stored_expert_bytes(gelu, form, "onnx")
        assert more >= 150_000
    assert resident_expert_bytes(gelu, "drop", "onnx") == 0


@pytest.mark.parametrize("widths", [(64, 72), (72, 64)])
def test_onnx_offers_branches_no_rows_that_they_cannot_read(widths: tuple[int, int]) -> None:
    """MatMulNBits has blocks of 16 or more; QMoE reads rows of any width."""
    silu = spec("qwen3_moe", *widths)
    assert "int8_row" in candidate_forms(silu, "onnx")
    found = find_candidates(replace(silu, hidden_act="gelu"), "onnx")
    assert "int8_row" not in found.forms
    sentence = f"in blocks of 16 or more; expert rows are {widths[0]} and {widths[1]}: not offered."
    assert any(line.endswith(sentence) for line in found.limits)
