"""What calibration on llama.cpp needs in memory, before it starts. No torch.

Letters: H hidden_size, I expert_width, E experts, k top_k, K = k + 1, T tokens in all windows,
W tokens of the longest window, B tokens that llama.cpp computes at a time, V vocabulary.
"""

from __future__ import annotations

from edge_moe.converters.calibration_memory import PACK_CHUNK_WEIGHTS
from edge_moe.formats.quantise import get_quantiser
from edge_moe.gguf_model import GgufModel
from edge_moe.plan import MemoryTerm, formula_terms
from edge_moe.runtime.llama_graph import batch_tokens, num_slots

_ALLOWANCE_BYTES = 96_000_000
"""Libraries paged in by the first call, llama.cpp's vocabulary, allocator slack."""
_PACK_BYTES_PER_WEIGHT = 64
_CACHE_STEP_TOKENS = 256  # llama.cpp rounds its KV cache up to this


def gguf_calibration_terms(
    model: GgufModel, num_tokens: int, window_tokens: int, quantiser: str
) -> list[MemoryTerm]:
    """Upper bounds of what calibration adds to a process that has imported torch, by term.

    The larger of two phases that are never in memory together, and an allowance. The file itself is
    mapped: its pages can be dropped and are not counted.
    """
    run = _running(model, window_tokens)
    measure = _measuring(model, num_tokens, window_tokens, quantiser)
    larger = max(run, measure, key=lambda terms: sum(terms.values()))
    larger["allowance"] = _ALLOWANCE_BYTES
    return formula_terms(larger)


def _running(model: GgufModel, window_tokens: int) -> dict[str, int]:
    """While windows run through llama.cpp.

    kv cache   float32 keys and values of W tokens, rounded up, and recurrent layers' states
    logits     2 x 4 B V: llama.cpp's answer and its place in the graph
    graph      4 B (K (3I + 2H) + 8H + 2E + 4 x widest dense row) and 3 x 4 x heads x B x W
    capture    4 B (K H + 3H + 2E) copied out, B (12 K H + 48 H + 64 K^2) of sums made of it
    """
    spec, slots = model.spec, num_slots(model.spec)
    hidden, batch = spec.hidden_size, batch_tokens(model.spec, window_tokens)
    cache_tokens = -(-window_tokens // _CACHE_STEP_TOKENS) * _CACHE_STEP_TOKENS
    skipped = model.expert_tensors | {"token_embd.weight", "output.weight"}
    dense = (info.shape for name, info in model.tensors.items() if name not in skipped)
    widest = max(max(shape, default=1) for shape in dense)
    row = slots * (3 * spec.expert_width + 2 * hidden) + 8 * hidden + 2 * spec.num_experts
    row += 4 * widest
    return {
        "kv cache": spec.unwindowed_kv_bytes(cache_tokens, 4),
        "logits": 2 * 4 * batch * spec.vocab_size,
        "graph": 4 * batch * row + 12 * spec.num_attention_heads * batch * cache_tokens,
        "capture": 4 * batch * (slots * hidden + 3 * hidden + 2 * spec.num_experts)
        + batch * (12 * slots * hidden + 48 * hidden + 64 * slots**2),
    }


def _measuring(
    model: GgufModel, num_tokens: int, window_tokens: int, quantiser: str
) -> dict[str, int]:
    """While forms are measured, layer by layer.

    activations  T (4H MoE inputs + 4H outputs of an expert that gets every token + 28 k routing
                 + 4E router scores)
    window       4 W (12H + 6I), and 4 W (7k + E) of one window being summed, twice
    experts      one expert read, dequantised, in the form, and its chunk being packed;
                 32 E (H + I) of moments
    hessians     where `quantiser` cannot do without: 4 (H^2 + I^2), and 24 max(H, I)^2
    """
    spec = model.spec
    hidden, width, top_k = spec.hidden_size, spec.expert_width, spec.top_k
    terms = {
        "activations": num_tokens * (8 * hidden + 28 * top_k + 4 * spec.num_experts),
        "window": 4 * window_tokens * (12 * hidden + 6 * width)
        + 8 * window_tokens * (7 * top_k + spec.num_experts),
        "experts": 4 * 5 * spec.expert_weights
        + 32 * spec.num_experts * (hidden + width)
        + _PACK_BYTES_PER_WEIGHT * PACK_CHUNK_WEIGHTS,
    }
    needs = get_quantiser(quantiser).needs
    if needs and "squares" not in needs:
        terms["hessians"] = 4 * (hidden**2 + width**2) + 24 * max(hidden, width) ** 2
    return terms
