"""Pure arithmetic: the memory bill of a model, term by term. No I/O, no weights.

Units: every result is bytes of the device that runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from edge_moe.candidates import stored_expert_bytes, stored_shape
from edge_moe.formats.integers import onnxruntime_copy_bytes
from edge_moe.measurement import usable_cores
from edge_moe.onnx_branches import branch_bytes, has_branches
from edge_moe.onnx_workspace import onnx_workspace_values
from edge_moe.overhead import triton_bytes
from edge_moe.plan import Device, MemoryTerm, Source, Target
from edge_moe.source_model import SourceModel, StoredTensor
from edge_moe.spec import ModelSpec
from edge_moe.units import format_bytes

PREFILL_CHUNK_TOKENS = 256
"""The native runtime feeds a prompt in pieces of this many tokens."""
ALLOCATOR_BYTES = 6_000_000
"""Freed pieces below 1 MiB that glibc keeps: 3 to 8 MB measured after prompts of 2048 to 4096."""
_OTHER_READING_THREADS = 2
"""The model's own thread, and the one that reads ahead."""
_MOST_READERS = 4
_MOST_READERS_BYTES = 32 * 2**20
"""Of experts that are read at once: one large one keeps a disk busy by itself."""
STAGING_BUFFERS = 4
"""In pinned RAM on the way to a GPU: some are filled while others are copied from."""
GRAPH_BYTES = 64_000_000
"""On CUDA: nodes and memory of captured graphs, beside keys and values repeated to every head,
which are billed in float32 and held in 16 bits, twice. An assumption: never measured."""
LLAMA_UBATCH_TOKENS = 512
"""llama.cpp's default micro-batch."""
_LLAMA_CACHE_STEP_TOKENS = 256
"""llama.cpp rounds sliding windows up to this."""
FLOAT32_BYTES = 4
_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

GGUF_RUNTIME_BYTES = 60_000_000
"""A Python process with llama-cpp-python loaded takes 41 MB; the rest is vocabulary and graph."""
ONNX_RUNTIME_BYTES = 325_000_000
"""A Python process with torch, transformers and an onnxruntime session: 309 to 320 MB measured on
Linux, at the end of a context, and 1.5 % more, for a budget is a cap. One with onnxruntime-genai
takes 87 MB, demo model included."""
_PER_LAYER_CONFIG_BYTES = 90_000_000
"""transformers imports much of itself for a configuration whose layers differ: 86 MB measured."""

PROCESS_TARGETS: tuple[Target, ...] = ("native", "hf")
"""Targets that run in a Python process, whose own memory is measured; the others' is a constant."""


@dataclass(frozen=True)
class Setting:
    """Where a model will run."""

    model: SourceModel
    target: Target
    device: Device
    context_tokens: int
    process: tuple[int, Source]
    """Bytes of the process without weights, its tokenizer included, and where they come from."""

    def bill(self, forms: Sequence[Sequence[str]]) -> list[MemoryTerm]:
        """Memory terms with experts in `forms` [L][E], or without any."""
        return memory_terms(
            self.model.spec,
            forms=forms,
            dense_bytes=dense_bytes(self.model, self.device, self.target),
            context_tokens=self.context_tokens,
            device=self.device,
            target=self.target,
            runtime_bytes=self.process[0],
            runtime_source=self.process[1],
        )


def memory_terms(
    spec: ModelSpec,
    *,
    forms: Sequence[Sequence[str]],
    dense_bytes: int,
    context_tokens: int,
    device: Device,
    target: Target,
    runtime_bytes: int,
    runtime_source: Source,
    scored_tokens: int = 1,
) -> list[MemoryTerm]:
    """The bill: dense weights, experts, KV cache, workspace, runtime.

    `forms` is [L][E], or empty for the bill without experts. `scored_tokens` is the number of
    positions whose logits are held at once: one, but a window's when quality is measured.
    """
    per_expert = {
        form: resident_expert_bytes(spec, form, target)
        for form in {form for row in forms for form in row}
    }
    experts = sum(per_expert[form] for row in forms for form in row)
    kv_itemsize = kv_itemsize_bytes(spec, device, target)
    if target == "onnx" and spec.expanded_kv_width:
        kv_bytes = context_tokens * _expanded_values(spec) * kv_itemsize
    else:
        kv_bytes = _kv_bytes(spec, context_tokens, kv_itemsize, target)
    kv_note = f"{context_tokens} tokens, {kv_itemsize} bytes per value"
    if target == "gguf" and spec.num_sliding_layers:
        kv_note += "; sliding layers hold a window and a batch (llama-cpp-python: swa_full=False)"
    if target == "onnx" and spec.num_sliding_layers:
        kv_note += "; sliding layers hold the whole context, too"
    return [
        MemoryTerm(
            name="dense weights",
            num_bytes=dense_bytes,
            source="headers",
            note="everything but routed experts; router rows of dropped experts are counted",
        ),
        MemoryTerm(
            name="experts",
            num_bytes=experts,
            source="formula",
            note=_experts_note(spec, target),
        ),
        MemoryTerm(name="KV cache", num_bytes=kv_bytes, source="formula", note=kv_note),
        MemoryTerm(
            name="workspace",
            num_bytes=_workspace_bytes(spec, context_tokens, device, target, scored_tokens),
            source="formula",
            note=_workspace_note(target),
        ),
        _runtime_term(spec, target, runtime_bytes, runtime_source),
    ]


def _experts_note(spec: ModelSpec, target: Target) -> str:
    if target != "onnx":
        return ""
    branches = ", and a branch for every expert" if has_branches(spec) else ""
    return f"with what onnxruntime holds twice: scales{branches}"


def resident_expert_bytes(spec: ModelSpec, form: str, target: Target) -> int:
    """What one expert in `form` takes in memory: its bytes, and what the runtime copies of them."""
    stored = stored_expert_bytes(spec, form, target)
    if target != "onnx":
        return stored
    hidden_size, expert_width, has_gate = stored_shape(spec, target)
    if has_branches(spec):
        return stored + branch_bytes(form, hidden_size, expert_width)
    return stored + onnxruntime_copy_bytes(form, (2 + has_gate) * hidden_size * expert_width)


def _kv_bytes(spec: ModelSpec, context_tokens: int, itemsize: int, target: Target) -> int:
    """Bytes that the context leaves behind.

    llama.cpp keeps the states of recurrent layers in float32, and in sliding layers room for a
    batch besides the window, rounded up (its programs do; llama-cpp-python needs swa_full=False).
    onnxruntime's attention reads a window from the cache of the whole context.
    """
    if target == "onnx":
        return spec.unwindowed_kv_bytes(context_tokens, itemsize)
    if target != "gguf":
        return spec.kv_bytes(context_tokens, itemsize)
    room = spec.sliding_window + LLAMA_UBATCH_TOKENS
    changed = replace(
        spec,
        sliding_window=-(-room // _LLAMA_CACHE_STEP_TOKENS) * _LLAMA_CACHE_STEP_TOKENS,
        state_values=spec.state_values * FLOAT32_BYTES // itemsize,
    )
    return changed.kv_bytes(context_tokens, itemsize)


def dense_bytes(model: SourceModel, device: Device, target: Target) -> int:
    """Bytes of everything but routed experts, as the target's runtime holds it.

    The native runtime on a CPU and the ONNX graph compute in float32: every weight takes 4 bytes.
    GGUF stores vectors and routers as float32 and matrices in the checkpoint's dtype. A tied
    lm_head is not counted again. A model that is a GGUF already keeps its tensors as they are.
    """
    spec = model.spec
    if spec.is_gguf:
        return sum(info.num_bytes for info in model.dense_tensors)
    itemsize = FLOAT32_BYTES if _computes_in_float32(device, target) else _DTYPE_BYTES[spec.dtype]
    routers = {
        name for layer_id in spec.moe_layer_ids for name in spec.router_tensor_names(layer_id)
    }
    total = 0
    for info in model.dense_tensors:
        if spec.is_tied_head(info.name):
            continue
        is_float32 = target == "gguf" and (len(info.shape) < 2 or info.name in routers)
        total += num_weights(info) * (FLOAT32_BYTES if is_float32 else itemsize)
    return total


def num_weights(info: StoredTensor) -> int:
    """Number of elements of a tensor."""
    return prod(info.shape)


def kv_itemsize_bytes(spec: ModelSpec, device: Device, target: Target) -> int:
    """Bytes per cached value: native on a CPU and onnx 4, hf the checkpoint's dtype, else 2."""
    if _computes_in_float32(device, target):
        return FLOAT32_BYTES
    if target == "hf":
        return _DTYPE_BYTES[spec.dtype]
    return 2


def workspace_bytes(
    spec: ModelSpec, context_tokens: int, device: Device, scored_tokens: int = 1
) -> int:
    """Native runtime: the largest moment of one prefill chunk, and its lasting buffers.

    With T = min(256, context) tokens, C the context, all in float32 but the packed bytes:

    always     the residual stream and its normed copy [T, 2H]; logits [scored, V]; a bounce buffer
               per reading thread, a 16-bit expert each; pieces that the allocator keeps
    attention  query, rotated query and output [T, 2Q + H], keys and values [T, K + V], the mask as
               booleans and as floats [T, C]; on CUDA keys and values repeated to every head,
               [C, 2Q] where heads are grouped; captured graphs
    experts    one expert unpacked, with half as much again for the codes of a matrix; inputs,
               outputs and their sum [T, 3H]; gate, up and their product [T, 3I]; router logits

    Layers that keep a state instead of a cache hold their own values per token instead, where
    those are more. Attention with sinks holds the scores of all heads, too.

    Multi-head latent attention expands its cache for one layer at a time, and since its keys and
    values differ in width torch has no fused attention for it on a CPU and holds the scores of all
    heads [heads, T, C] about 2.4 times (measured: 316 MB at 256 x 4096 tokens, 32 heads).
    """
    tokens, context = min(PREFILL_CHUNK_TOKENS, context_tokens), context_tokens
    hidden, query = spec.hidden_size, spec.query_width
    always = 2 * tokens * hidden + scored_tokens * spec.vocab_size
    attention = tokens * (2 * query + hidden + spec.kv_key_width + spec.kv_value_width)
    attention += tokens * context * 5 // 4
    if spec.expanded_kv_width or spec.holds_scores:
        attention += tokens * context * spec.num_attention_heads * 12 // 5
        attention += context * spec.expanded_kv_width
    is_grouped = spec.num_kv_heads != spec.num_attention_heads and not spec.expanded_kv_width
    if is_grouped and (device == "cuda" or spec.holds_scores):
        attention += 2 * context * query
    attention = max(attention, tokens * spec.state_workspace)
    experts = spec.expert_weights * 7 // 6 + tokens * (
        3 * hidden + 3 * spec.expert_width + spec.num_experts
    )
    bounce_bytes = reading_threads(spec) * 2 * spec.expert_weights
    floats = always + max(attention, experts)
    graph_bytes = GRAPH_BYTES if device == "cuda" else 0
    return FLOAT32_BYTES * floats + bounce_bytes + ALLOCATOR_BYTES + graph_bytes


def demand_readers(spec: ModelSpec) -> int:
    """Threads of the native runtime that read a layer's missing experts at once; 0 where one does.

    Each holds a bounce buffer of an expert.
    """
    count = min(_MOST_READERS, _MOST_READERS_BYTES // (2 * spec.expert_weights))
    return count if count > 1 else 0


def reading_threads(spec: ModelSpec) -> int:
    """All threads of the native runtime that may read experts, at the same time."""
    return _OTHER_READING_THREADS + demand_readers(spec)


def llama_compute_bytes(spec: ModelSpec, context_tokens: int) -> int:
    """llama.cpp's compute buffer, which reuses its memory from layer to layer.

    With U = min(512, context) tokens the larger of two moments, in float32: the output layer,
    logits and hidden states [U, V + H]; and attention without flash attention, scores of all
    heads [heads, U, context] beside hidden states. The first gives 300.8 MiB for Qwen3-30B-A3B, as
    llama.cpp prints.
    """
    tokens = min(LLAMA_UBATCH_TOKENS, context_tokens)
    output = spec.vocab_size + spec.hidden_size
    attention = spec.num_attention_heads * context_tokens + 3 * spec.hidden_size
    return FLOAT32_BYTES * tokens * max(output, attention)


def minimum_budget_bytes(fixed_terms: Sequence[MemoryTerm], smallest_expert_bytes: int) -> int:
    """The smallest budget that works: every term but the experts, and the cheapest expert set."""
    return non_expert_bytes(fixed_terms) + smallest_expert_bytes


def non_expert_bytes(terms: Sequence[MemoryTerm]) -> int:
    """Bytes of every term but the experts."""
    return sum(term.num_bytes for term in terms if term.name != "experts")


def describe_terms(terms: Sequence[MemoryTerm]) -> str:
    """`dense weights 1.20 GB + KV cache 403 MB + ...`."""
    return " + ".join(f"{term.name} {format_bytes(term.num_bytes)}" for term in terms)


def _expanded_values(spec: ModelSpec) -> int:
    """Values that a token takes in the ONNX graph's cache of latent attention: keys of all heads,
    and values as wide as them, in all layers."""
    return spec.num_layers * 2 * spec.query_width


def _computes_in_float32(device: Device, target: Target) -> bool:
    return target == "onnx" or (target == "native" and device == "cpu")


def _workspace_bytes(
    spec: ModelSpec, context_tokens: int, device: Device, target: Target, scored_tokens: int
) -> int:
    if target == "gguf":
        return llama_compute_bytes(spec, context_tokens)
    if target == "onnx" and device == "cpu":
        values = onnx_workspace_values(
            spec,
            tokens=min(PREFILL_CHUNK_TOKENS, context_tokens),
            context_tokens=context_tokens,
            scored_tokens=scored_tokens,
            num_threads=usable_cores(),
        )
        return FLOAT32_BYTES * values + ALLOCATOR_BYTES
    return workspace_bytes(spec, context_tokens, device, scored_tokens)


def _workspace_note(target: Target) -> str:
    if target == "gguf":
        return f"llama.cpp's compute buffer at a micro-batch of {LLAMA_UBATCH_TOKENS} tokens"
    if target == "onnx":
        return (
            f"activations of {PREFILL_CHUNK_TOKENS} tokens, experts' on every core; two experts in "
            "float32"
        )
    return f"one expert in float32, activations of {PREFILL_CHUNK_TOKENS} tokens"


def _runtime_term(spec: ModelSpec, target: Target, num_bytes: int, source: Source) -> MemoryTerm:
    """llama.cpp and onnxruntime run in processes of their own, which are not measured.

    `num_bytes` is the measured process and the tokenizer, or the tokenizer alone.
    """
    if target == "gguf":
        note = "a llama.cpp process without weights"
        return MemoryTerm(name="runtime", num_bytes=GGUF_RUNTIME_BYTES, source="assumed", note=note)
    if target == "onnx":
        has_own_layers = not spec.is_gguf and spec.family.has_global_heads
        more_bytes = _PER_LAYER_CONFIG_BYTES + triton_bytes() if has_own_layers else 0
        return MemoryTerm(
            name="runtime",
            num_bytes=num_bytes + ONNX_RUNTIME_BYTES + more_bytes,
            source="assumed",
            note="`edge-moe run` with onnxruntime; onnxruntime-genai takes about 90 MB",
        )
    return MemoryTerm(name="runtime", num_bytes=num_bytes, source=source)
