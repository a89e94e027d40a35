"""How families name and shape the parts of a decoder layer, where it is not as most do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Names below a layer, and what its parts compute."""

    epsilon_key: str = "rms_norm_eps"
    """config.json key of what norms add."""
    adds_one: bool = False
    """Norms of the layers, of queries and of keys multiply by 1 + their weight."""
    attention: str = "self_attn"
    attention_norms: tuple[str, str] = ("q_norm", "k_norm")
    """Of queries and keys, where the checkpoint has them."""
    attention_output: str = "o_proj"
    has_gated_attention: bool = False
    """q_proj gives every head's query and then the gate of its output (arXiv:2505.06708)."""
    attention_scale: float | None = None
    """What scores are multiplied by, where it is not 1 / sqrt(width)."""
    is_rotary: bool = True
    is_interleaved: bool = False
    """Values 2i and 2i + 1 of a head rotate together; latent attention has a config key for it."""
    scales_embedding: bool = False
    """Token embeddings are multiplied by sqrt(hidden_size)."""
    mlp: str = "mlp"
    projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    """Of a dense MLP; two where it has no gate and its activation is relu squared."""
    up_offset: float = 0.0
    """What is added to up before f(gate) multiplies it."""
    added_sum: float = 1e-20
    """What a router of sigmoids adds to the sum that it divides by."""


_GATED_QWEN = Layout(adds_one=True, has_gated_attention=True)
_LAYOUTS = {
    "ernie4_5_moe": Layout(is_interleaved=True),
    "gemma4_text": Layout(attention_scale=1.0, scales_embedding=True),
    "gpt_oss": Layout(up_offset=1.0),
    "lfm2_moe": Layout(
        epsilon_key="norm_eps",
        attention_norms=("q_layernorm", "k_layernorm"),
        attention_output="out_proj",
        mlp="feed_forward",
        projections=("w1", "w3", "w2"),
        added_sum=1e-6,
    ),
    "qwen3_next": _GATED_QWEN,
    "qwen3_5_moe_text": _GATED_QWEN,
    "nemotron_h": Layout(
        epsilon_key="layer_norm_epsilon",
        attention="mixer",
        is_rotary=False,
        mlp="mixer",
        projections=("up_proj", "down_proj"),
    ),
}
_USUAL = Layout()


def layout_of(model_type: str) -> Layout:
    """The layout of a family."""
    return _LAYOUTS.get(model_type, _USUAL)
