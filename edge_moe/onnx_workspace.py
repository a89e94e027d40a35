"""What onnxruntime holds on a CPU while it computes a piece of a prompt. Pure arithmetic.

Its arena gives nothing back and finds a new place for what has grown since the last piece, so
moments add up. Factors are measured with onnxruntime 1.32 on two cores, as anonymous memory beyond
the cache, on 37 small models of 4 to 128 heads: the sum is 1.0 to 2.1 times of that, and up to 4.4
times where large experts need no unpacking. One was beyond it: 8-bit experts of 7 million weights
took 78 or 149 MB of 88, for the arena kept a piece of each size.
"""

from __future__ import annotations

from edge_moe.onnx_branches import has_branches
from edge_moe.spec import ModelSpec

_UNPACKED_EXPERTS = 2


def onnx_workspace_values(
    spec: ModelSpec,
    *,
    tokens: int,
    context_tokens: int,
    scored_tokens: int,
    num_threads: int,
) -> int:
    """float32 values that a piece of T `tokens` takes with a context of C.

    always     the residual stream and its normed copy [T, 2H]; logits [scored, V]
    attention  queries six times, keys and values three times [T, 6Q + 3K + 3V + H]: projected,
               normed, rotated, mixed; the kernel keeps no scores, but with sinks [heads, T, C] and
               those of the piece before. Latent keys and values are there for every head, as wide
               as queries, and as they were expanded
    states     what a token takes in the layers that keep one
    experts    of each thread: its sum of outputs, inputs, gate and up, their product, outputs
               [T, 3H + 3I], as QMoE allocates (microsoft/onnxruntime,
               contrib_ops/cpu/moe/moe_quantization_cpu.cc); router logits; two experts unpacked,
               as 8 bits need on two threads: on more they take one each, which is not counted,
               since 4 bits need none. Branches run one by one, and unpack nothing
    """
    hidden, query, width = spec.hidden_size, spec.query_width, spec.expert_width
    is_latent = spec.expanded_kv_width > 0
    keys_and_values = 2 * query if is_latent else spec.kv_key_width + spec.kv_value_width
    mixer = tokens * (6 * query + 3 * keys_and_values + hidden + spec.expanded_kv_width)
    if spec.holds_scores:
        mixer += 2 * spec.num_attention_heads * tokens * context_tokens
    mixer = max(mixer, tokens * spec.onnx_state_workspace)
    experts = tokens * 3 * (spec.expert_hidden + width)
    if not has_branches(spec):
        experts = num_threads * experts + _UNPACKED_EXPERTS * spec.expert_weights
    experts += tokens * spec.num_experts
    return 2 * tokens * hidden + scored_tokens * spec.vocab_size + mixer + experts
