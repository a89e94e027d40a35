"""What an architecture family is: names, layouts and rules. `families.py` has the table.

`{layer}` is filled in by `ModelSpec`. Module paths are those of transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edge_moe.config_reader import ConfigReader
from edge_moe.layer_rules import LayerRule, MemoryRule, all_full, every_layer

Attention = Literal["grouped", "latent", "other"]
Scores = Literal["softmax", "sigmoid", "sparsemixer"]
StateRule = Callable[[ConfigReader], int]
"""Values of the fixed state that one layer without a KV cache keeps per sequence."""


@dataclass(frozen=True)
class Family:
    """Names of one architecture family, on disk and in transformers."""

    architecture: str
    """Class name in transformers, as in config.json's `architectures`."""
    moe_prefix: str = "model.layers.{layer}.mlp"
    """Checkpoint prefix of the MoE block."""
    moe_module: str = "model.layers.{layer}.mlp"
    """Module path of the MoE block in transformers; it holds router and experts."""
    renames: tuple[tuple[str, str], ...] = ()
    """(start of a checkpoint's name, start of the module's), outside the MoE blocks."""
    block_renames: tuple[tuple[str, str], ...] = ()
    """The same under the MoE block."""
    embedding: str = "model.embed_tokens.weight"
    """Checkpoint name of the token embeddings."""
    final_norm: str = "model.norm.weight"
    """Checkpoint name of the norm after the last layer."""
    draft_prefix: str = "mtp."
    """Start of the names of multi-token prediction, where it is no numbered layer."""
    layer_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")

    has_gate: bool = True
    """Experts have a gate_proj beside up_proj."""
    projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    """On-disk names of gate_proj, up_proj, down_proj, under `experts.{expert}`; the first is left
    out where there is no gate."""
    stacked: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj")
    """On-disk names of all experts' gate and up, and down, where the family's files stack them."""
    is_transposed: bool = False
    """Stacked experts are [E, inputs, outputs], gate and up rows taking turns (gpt-oss)."""

    router: str = "gate"
    """Module under `moe_module` that returns (scores, weights, expert ids)."""
    logits_module: str = ""
    """Module under `moe_module` that gives the raw logits, where the router returns others."""
    moe_output: str = ""
    """Module under `moe_module` whose output is what routed experts add; "" is the block itself."""
    router_tensors: tuple[str, ...] = ("gate.weight",)
    """Tensors under `moe_prefix` with one row per expert: sliced when experts are dropped."""
    selection_bias: str = ""
    """Another one: a bias that decides the choice, but not the weight."""
    selection_bias_flag: str = ""
    """config.json key that must be true for the selection bias to exist."""
    score_function: Scores = "softmax"
    """What turns logits into scores. Softmax over the chosen logits only is a softmax over all
    of them, renormalised."""
    always_renormalises: bool = False
    """Router weights are renormalised whatever `norm_topk_prob` says."""
    never_renormalises: bool = False
    group_score: Literal["best two", "best"] = "best two"
    """What a group-limited router ranks groups by: its two best scores, or its best."""
    ungrouped_method: str = ""
    """config.json's `topk_method` with which experts lie in no groups, whatever `n_group` says."""
    fewest_experts: int = 1
    """A layer keeps at least this many: DeepSeek's router always takes the best two of a group."""

    num_experts_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    """config.json keys that may hold the number of routed experts; all present ones are patched."""
    top_k_keys: tuple[str, ...] = ("num_experts_per_tok",)
    expert_width_keys: tuple[str, ...] = ("moe_intermediate_size", "intermediate_size")
    shared_width_key: str = ""
    """config.json key of the shared expert's own width."""
    shared_count_key: str = ""
    """Key that states a shared expert's width as so many routed experts' widths."""
    shared_module: str = "shared_experts"
    """Name of the shared expert under the MoE block."""
    moe_layers: LayerRule = every_layer
    layer_memory: MemoryRule = all_full
    windows: Literal["no layer", "every layer", "layer_types"] = "no layer"
    """Layers whose attention transformers limits to config.json's `sliding_window`: other families
    ignore the key, which many of their files have."""
    state_values: StateRule | None = None
    """Where some layers keep a state instead of keys and values."""
    state_workspace: StateRule | None = None
    """float32 values per token that such a layer holds at its largest moment."""
    onnx_state_workspace: StateRule | None = None
    """The same in onnxruntime, where it is not as much."""
    holds_scores: bool = False
    """Attention keeps the scores of all heads, as with sinks, which torch has no fused kernel for.
    """
    attention: Attention = "grouped"
    """Shapes of the attention weights: grouped queries, DeepSeek's latent attention, or others,
    which only transformers checks."""
    has_global_heads: bool = False
    """Full-attention layers have heads of their own (Gemma 4)."""
    qk_norm: Literal["", "head", "all"] = ""
    """Norms on queries and keys: one for every head, or one over all heads."""
    config_defaults: Mapping[str, Any] = field(default_factory=dict)
    """transformers' values of the keys that config.json leaves out."""
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """config.json keys and the only values of them that are handled."""

    minimal: Mapping[str, Any] = field(default_factory=dict)
    """config.json keys of a minimal model, beside those that `minimal_config` sets for all."""

    gguf_arch: str | None = None
    """llama.cpp architecture that this family is exported to; `edge_moe.gguf_arch` says how that
    routes. None where there is none."""
    gguf_reason: str = ""
    """Why there is none."""
    gguf_limits: tuple[str, ...] = ()
    """What llama.cpp computes a little differently, in sentences."""

    @property
    def has_plain_blocks(self) -> bool:
        """Gated experts without biases under a router that knows its own bias, if it has one."""
        is_plain = self.has_gate and not self.is_transposed and not self.logits_module
        knows_bias = not self.selection_bias or self.selection_bias.startswith("gate.e_score")
        return is_plain and knows_bias and self.score_function != "sparsemixer"
