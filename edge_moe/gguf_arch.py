"""What llama.cpp's graphs do with experts, per architecture, and the `ModelSpec` of a GGUF file.

The table says what metadata does not: it was read from llama.cpp's src/models/*.cpp (the calls of
`build_moe_ffn` and `load_arch_hparams`), as of the release that llama-cpp-python 0.3.36 brings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edge_moe.errors import SpecError
from edge_moe.gguf_cache import CacheRules, layer_caches
from edge_moe.gguf_header import GgufHeader
from edge_moe.gguf_keys import GgufKeys
from edge_moe.router_spec import RouterSpec
from edge_moe.spec import GGUF_PREFIX, ModelSpec

_GATING = {1: "softmax", 2: "sigmoid"}
"""`llama_expert_gating_func_type`; 3 is a softmax over the chosen experts only."""
_SOFTMAX_OF_CHOSEN = 3


@dataclass(frozen=True)
class GgufArch:
    """How one of llama.cpp's graphs routes."""

    score: str | None = "softmax"
    """None: the key expert_gating_func must say."""
    reads_gating: bool = False
    """The key expert_gating_func, where present, decides."""
    renormalises: bool | None = True
    """None: the key expert_weights_norm decides, absent means no."""
    reads_scale: bool = False
    """The key expert_weights_scale is used; other graphs ignore it."""
    hidden_act: str = "silu"
    cache: CacheRules = CacheRules()
    has_gate: bool = True
    """Experts multiply gate_proj's and up_proj's outputs; else they have no gate_proj."""


_KEYED = GgufArch(None, reads_gating=True, renormalises=None, reads_scale=True)
GGUF_ARCHS: dict[str, GgufArch] = {
    "olmoe": GgufArch(renormalises=False),
    "qwen2moe": GgufArch(renormalises=False),
    "qwen3moe": GgufArch(),
    "qwen3vlmoe": GgufArch(),
    "qwen3next": GgufArch(cache=CacheRules(has_interval=True)),
    "qwen35moe": GgufArch(cache=CacheRules(has_interval=True)),
    "llama": GgufArch(),
    "phimoe": GgufArch(),
    "dbrx": GgufArch(),
    "granitemoe": GgufArch(),
    "granitehybrid": GgufArch(),
    "hunyuan-moe": GgufArch(),
    "mellum": GgufArch(cache=CacheRules(sliding_period=4)),
    "rnd1": GgufArch(),
    "ernie4_5-moe": GgufArch(),
    "llada-moe": GgufArch(renormalises=False),
    "jamba": GgufArch(renormalises=False),
    "deepseek": GgufArch(renormalises=False, reads_scale=True),
    "deepseek2": GgufArch("softmax", reads_gating=True, renormalises=None, reads_scale=True),
    "glm4moe": GgufArch("sigmoid", reads_gating=True, renormalises=None, reads_scale=True),
    "afmoe": GgufArch(
        "sigmoid",
        reads_gating=True,
        renormalises=None,
        reads_scale=True,
        cache=CacheRules(sliding_period=4),
    ),
    "bailingmoe": GgufArch(renormalises=None, reads_scale=True),
    "bailingmoe2": _KEYED,
    "dots1": _KEYED,
    "exaone-moe": replace(_KEYED, cache=CacheRules(sliding_period=4)),
    "minimax-m2": GgufArch(None, reads_gating=True),
    "lfm2moe": GgufArch(None, reads_gating=True),
    # softmax over the chosen experts is softmax over all of them, renormalised
    "gpt-oss": GgufArch(hidden_act="swiglu_oai", cache=CacheRules(sliding_period=2)),
    "gemma4": GgufArch(hidden_act="gelu", cache=CacheRules(sliding_period=0)),
    "nemotron_h_moe": GgufArch(
        "sigmoid",
        renormalises=None,
        reads_scale=True,
        hidden_act="relu2",
        cache=CacheRules(has_lone_experts=True),
        has_gate=False,
    ),
}
_GLM_LITE_LAYERS, _GLM_LITE_VOCAB = (47, 48), 154_880
"""deepseek2 without expert_gating_func: GLM-4.7-Lite scores with a sigmoid, DeepSeek-V2 not."""


@dataclass(frozen=True)
class GgufShapes:
    """What the tensors themselves say about the model."""

    moe_layer_ids: tuple[int, ...]
    expert_width: int
    vocab_size: int
    has_selection_bias: bool
    has_output: bool
    """An output matrix of its own, not the token embedding again."""


def gguf_arch(header: GgufHeader) -> GgufArch:
    """The row of `header`'s architecture.

    Raises:
        SpecError: it has no experts that are understood here.
    """
    found = GGUF_ARCHS.get(header.architecture)
    if found is None:
        raise SpecError(
            f"{header.path}: llama.cpp architecture {header.architecture!r} is not supported as a "
            f"source; supported are {', '.join(sorted(GGUF_ARCHS))}: give a model of one of these, "
            "or the Hugging Face folder that it was made from"
        )
    return found


def gguf_spec(header: GgufHeader, shapes: GgufShapes) -> ModelSpec:
    """The spec of a GGUF model: metadata, with what its tensors say.

    Raises:
        SpecError: an unknown architecture, a missing key or a value out of range.
    """
    keys = GgufKeys(header)
    num_experts, top_k = keys.count("expert_count"), keys.count("expert_used_count")
    if top_k > num_experts:
        raise SpecError(
            f"{header.path}: expert_used_count is {top_k} but there are {num_experts} experts: "
            "download or export the file again"
        )
    hidden_size = keys.count("embedding_length")
    num_layers = keys.count("block_count") - keys.count("nextn_predict_layers", 0, least=0)
    heads = keys.largest("attention.head_count")
    plain_width = max(hidden_size // heads, 1)
    caches = layer_caches(keys, gguf_arch(header).cache, num_layers, heads, plain_width)
    head_width = keys.count("attention.key_length", plain_width)
    return ModelSpec(
        model_type=f"{GGUF_PREFIX}{header.architecture}",
        architecture=header.architecture,
        num_layers=num_layers,
        moe_layer_ids=shapes.moe_layer_ids,
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden_size,
        expert_width=shapes.expert_width,
        num_shared_experts=keys.count("expert_shared_count", 0, least=0),
        vocab_size=shapes.vocab_size,
        num_attention_heads=heads,
        num_kv_heads=keys.largest("attention.head_count_kv", heads),
        query_width=heads * head_width,
        kv_key_width=caches.key_width,
        kv_value_width=caches.value_width,
        num_sliding_layers=caches.num_sliding_layers,
        sliding_window=caches.sliding_window,
        sliding_kv_width=caches.sliding_kv_width,
        num_state_layers=caches.num_state_layers,
        state_values=caches.state_values,
        expanded_kv_width=0,
        max_position_embeddings=keys.count("context_length"),
        tie_word_embeddings=not shapes.has_output,
        dtype="float16",
        hidden_act=gguf_arch(header).hidden_act,
        router=_router(keys, header, shapes, num_experts, top_k),
        latent_width=keys.count("moe_latent_size", 0, least=0),
        is_gateless=not gguf_arch(header).has_gate,
    )


def _router(
    keys: GgufKeys, header: GgufHeader, shapes: GgufShapes, num_experts: int, top_k: int
) -> RouterSpec:
    arch = gguf_arch(header)
    score, is_of_chosen = _score(keys, header, arch, shapes)
    norm = header.metadata.get(f"{header.architecture}.expert_weights_norm")
    renormalises = bool(norm) if arch.renormalises is None else arch.renormalises
    num_groups = keys.count("expert_group_count", 1, least=0) or 1
    top_groups = keys.count("expert_group_used_count", 1, least=0) or 1
    if num_experts % num_groups or top_groups > num_groups:
        raise SpecError(
            f"{header.path}: {num_experts} experts do not divide into expert_group_count="
            f"{num_groups} groups of which {top_groups} are used: download the file again"
        )
    if top_groups * (num_experts // num_groups) < top_k:
        raise SpecError(
            f"{header.path}: {top_groups} groups of {num_experts // num_groups} hold fewer than "
            f"expert_used_count={top_k} experts: download the file again"
        )
    scale = keys.number("expert_weights_scale") if arch.reads_scale else None
    return RouterSpec(
        score_function=score,
        renormalises=renormalises or is_of_chosen,
        has_selection_bias=shapes.has_selection_bias,
        num_groups=num_groups,
        top_groups=top_groups,
        scale=scale or 1.0,  # 0 is llama.cpp's own way to say that there is none
    )


def _score(
    keys: GgufKeys, header: GgufHeader, arch: GgufArch, shapes: GgufShapes
) -> tuple[str, bool]:
    """(score function, whether it runs over the chosen experts only)."""
    stated = keys.count("expert_gating_func", 0, least=0) if arch.reads_gating else 0
    if stated == _SOFTMAX_OF_CHOSEN:
        return "softmax", True
    if stated in _GATING:
        return _GATING[stated], False
    if stated or arch.score is None:
        raise keys.fail("expert_gating_func", stated or None, "1 (softmax), 2 (sigmoid) or 3")
    is_lite = (
        header.architecture == "deepseek2"
        and shapes.vocab_size == _GLM_LITE_VOCAB
        and header.number("block_count") in _GLM_LITE_LAYERS
    )
    return "sigmoid" if is_lite else arch.score, False
