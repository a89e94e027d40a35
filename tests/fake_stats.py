"""Statistics made up for a checkpoint, so that planning can be tested without a forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_moe.candidates import candidate_forms
from edge_moe.checkpoint import Checkpoint
from edge_moe.formats import split_form
from edge_moe.gguf_model import GgufModel
from edge_moe.gradient_stats import GRADIENT_VERSION, FormCost, GradientInfo, GradientStats
from edge_moe.offer import gguf_forms
from edge_moe.stats import STATS_VERSION, ExpertStats, StatsInfo

LOSS_SHARES = {
    "drop": 1.0,
    "tq1_0": 0.3,
    "q2_0": 0.2,
    "q2_k": 0.12,
    "int2_b64": 0.18,
    "int2_b32": 0.15,
    "q3_k": 0.03,
    "q4_0": 0.01,
    "q4_k": 0.007,
    "int4_b64": 0.009,
    "int4_b32": 0.008,
    "q5_k": 0.002,
    "q6_k": 5e-4,
    "int8_row": 5e-5,
    "q8_0": 4e-5,
    "f32": 0.0,
    "f16": 1e-8,
    "bf16": 1e-6,
}
"""Loss of a form as a share of the loss of dropping the expert."""


def loss_share(form: str) -> float:
    """As in `LOSS_SHARES`; half of a mix's hangs on down_proj."""
    if form in LOSS_SHARES:
        return LOSS_SHARES[form]
    outer, _, inner = split_form(form)
    return (LOSS_SHARES[outer] + LOSS_SHARES[inner]) / 2


def fake_stats(
    checkpoint: Checkpoint | GgufModel,
    forms: Sequence[str] | None = None,
    seed: int = 0,
    **info: object,
) -> ExpertStats:
    """Heavy-tailed losses, 1000 tokens, expert 0 of the first MoE layer a super expert."""
    spec = checkpoint.spec
    if forms is None and isinstance(checkpoint, GgufModel):
        forms = gguf_forms(checkpoint)
    measured = tuple(forms or candidate_forms(spec, "native"))
    fields: dict[str, object] = {
        "version": STATS_VERSION,
        "edge_moe_version": "0.1.0",
        "model_type": spec.model_type,
        "model_fingerprint": checkpoint.fingerprint,
        "tokenizer_fingerprint": "t",
        "data_fingerprint": "d",
        "tasks": ("code",),
        "window_tokens": 100,
        "num_windows": 10,
        "windows": tuple(range(10)),
        "num_tokens": 1000,
        "moe_layer_ids": spec.moe_layer_ids,
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "forms": measured,
    }
    stats = ExpertStats.zeros(StatsInfo.model_validate(fields | info))
    generator = np.random.default_rng(seed)
    shape = stats.routed_tokens.shape
    drop_loss = np.exp(generator.normal(0, 2, shape))
    stats.form_loss.add(drop_loss[..., None] * np.array([loss_share(form) for form in measured]))
    stats.expert_sums["gated_square"].add(1.5 * drop_loss)
    stats.layer_sums["residual_square"].add(10.0 + np.arange(shape[0]))
    stats.layer_sums["moe_square"].add(np.ones(shape[0]))
    stats.routed_tokens += generator.integers(100, 400, shape)
    stats.max_output += generator.uniform(1, 2, shape)
    stats.max_output[0, 0] = 100.0
    return stats


def fake_gradients(stats: ExpertStats, seed: int = 1, **info: object) -> GradientStats:
    """Of the same run as `stats`: every expert's losses weighed anew, layer l by 2**l."""
    num_layers, num_experts = stats.routed_tokens.shape
    fields: dict[str, object] = {
        **stats.info.model_dump(exclude={"version"}),
        "version": GRADIENT_VERSION,
        "labels": "text",
        "hidden_size": 64,
        "expert_width": 64,
    }
    gradients = GradientStats.zeros(GradientInfo.model_validate(fields | info))
    generator = np.random.default_rng(seed)
    weight = 2.0 ** np.arange(num_layers)
    gradients.gradient_square.add(64 * stats.info.num_tokens * weight)
    losses = stats.form_loss.values()
    gradients.form_cost[FormCost.OUTPUT_CHANGE].add(losses)
    for kind in (FormCost.DIAGONAL, FormCost.FIRST_ORDER):
        share = generator.uniform(0.1, 3, (num_layers, num_experts, 1))
        gradients.form_cost[kind].add(losses * weight[:, None, None] * share)
    gradients.routed_tokens += stats.routed_tokens
    gradients.loss_nats.add([2.5 * gradients.info.num_predictions])
    return gradients
