"""HEAPr (arXiv 2509.22299): narrower experts, without the hidden units the loss misses least.

    s_k = 1/2 mean(h_k**2) (w_k . G w_k),   G = mean(g g^T)

over the tokens of an expert, with h_k what unit k gives to down_proj, w_k its column there and g
the gradient of the language-model loss at the expert's output; the scores come in as `[E, I]`. A
unit goes with its gate row, up row and down column; the router stays.

The paper ranks units over all layers and experts together, so every expert gets a width of its own,
which fused tensors, vLLM and GGUF cannot hold. Here every expert of every layer keeps the same
number of its best units. Super experts are narrowed like the others for the same reason.
"""

from __future__ import annotations

import numpy as np
import torch

from edge_moe.converters.gradient_memory import statistics_bytes
from edge_moe.converters.transforms.base import LayerResult, LayerTask, LayerWeights, register
from edge_moe.errors import InputError
from edge_moe.formats import FORM_NAMES, form_fits
from edge_moe.spec import ModelSpec

WIDTH_STEP = 32
"""The smallest block of the packed forms (q4_0, q8_0)."""


@register(
    "heapr",
    "narrow every expert to its best hidden units, by the loss gradient",
    "arXiv 2509.22299",
    shrinks="width",
    scratch_bytes=lambda spec, num_tokens: _scratch_bytes(spec),
)
def heapr(task: LayerTask) -> LayerResult:
    """All experts, each with its best units in their old order."""
    if task.neuron_scores is None:
        raise RuntimeError("heapr needs neuron scores")
    order = np.argsort(-task.neuron_scores, axis=1, kind="stable")
    kept = np.sort(order[:, : task.expert_width], axis=1)
    members = [[expert_id] for expert_id in range(task.weights.num_experts)]
    total = task.neuron_scores.clip(0).sum()
    share = np.take_along_axis(task.neuron_scores.clip(0), kept, axis=1).sum()
    facts = {"share_of_score_kept": float(share / total) if total else 1.0}
    return LayerResult(slice_units(task.weights, torch.from_numpy(kept)), members, facts)


def slice_units(weights: LayerWeights, kept: torch.Tensor) -> LayerWeights:
    """Only the hidden units `kept` [E, I'] of every expert; the router is copied."""
    hidden = weights.gate_up.shape[2]
    rows = torch.cat([kept, kept + weights.expert_width], dim=1)  # [E, 2I']
    gate_up = weights.gate_up.gather(1, rows[:, :, None].expand(-1, -1, hidden))
    down = weights.down.gather(2, kept[:, None, :].expand(-1, hidden, -1))
    return LayerWeights(
        gate_up, down, {name: rows.clone() for name, rows in weights.router.items()}
    )


def check_width(spec: ModelSpec, width: int) -> None:
    """Refuse a width that no packed form can hold.

    Raises:
        InputError: not a multiple of the smallest block, or outside 1..I.
    """
    if not 0 < width <= spec.expert_width or width % WIDTH_STEP:
        raise InputError(
            f"cannot narrow experts to {width}: use a multiple of {WIDTH_STEP} up to "
            f"{spec.expert_width}, the model's width; k-quants and ternary forms need one of 256"
        )


def fitting_forms(spec: ModelSpec, width: int) -> tuple[str, ...]:
    """Packed forms that hold experts of `width`; `drop` is not among them."""
    names = FORM_NAMES[1:]
    return tuple(name for name in names if form_fits(name, spec.hidden_size, width))


def _scratch_bytes(spec: ModelSpec) -> int:
    """The statistics of all layers while they are read, which leave less behind: the scores; and
    64 bytes per unit of the layer whose units are ranked."""
    return statistics_bytes(spec) + 64 * spec.num_experts * spec.expert_width
