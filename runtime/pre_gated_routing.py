"""`PreGatedRouting`: puts a pre-gate's choice in the place of the routers' in a model that runs.

Every router still computes its logits, a [E, H] product: they weigh the experts that the pre-gate
chose. Letters: T tokens, L MoE layers, E experts, H hidden_size, K top_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edge_moe.errors import InputError
from edge_moe.runtime.moe_block import MoeBlock
from edge_moe.runtime.pre_gate import PreGate
from edge_moe.runtime.router_weights import expert_weights, require_weighable
from edge_moe.spec import ModelSpec


class PreGatedRouting:
    """Of one model; belongs to its thread. Close it when the model shall route by itself again."""

    def __init__(self, gate: PreGate, blocks: Sequence[MoeBlock], spec: ModelSpec) -> None:
        """`gate` has a row for every router row of `blocks`, on their device."""
        self._gate = gate
        self._blocks = blocks
        self._router = spec.router
        self._top_k = spec.top_k
        self._rows: list[Tensor] = []
        self._coming: list[list[int]] | None = None
        self._logits: list[Tensor | None] = [None] * len(blocks)
        self._hooks = [blocks[0].router.register_forward_pre_hook(self._begin)]
        self._hooks += [
            block.on_logits(self._keeper(layer)) for layer, block in enumerate(blocks) if layer
        ]

    def coming(self, layer: int) -> list[list[int]]:
        """Rows that the single token at hand will use in each layer after `layer`, in order."""
        if self._coming is None:
            table = torch.stack([rows[0] for rows in self._rows]).tolist()
            self._coming = [sorted(rows) for rows in table]
        return self._coming[layer:]

    def choice(self, layer: int, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, weights), [T, K] each, of `layer`, whose router chose those given."""
        if layer == 0:
            return rows, weights
        logits = self._logits[layer]
        if logits is None or len(self._rows) < layer:
            raise RuntimeError("the routers were not run before the experts")
        chosen = self._rows[layer - 1].to(rows)
        scale = self._blocks[layer].expert_scale
        found = expert_weights(self._router, logits.flatten(0, -2), chosen, scale)
        return chosen, found.to(weights)

    def close(self) -> None:
        """Let the model go."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: Any, arguments: tuple[Any, ...]) -> None:
        hidden: Tensor = arguments[0]
        self._rows = self._gate.choose(hidden.flatten(0, -2), self._top_k)
        self._coming = None

    def _keeper(self, layer: int) -> Any:
        def keep(logits: Tensor) -> None:
            self._logits[layer] = logits

        return keep


def require_pre_gate(
    gate: PreGate, spec: ModelSpec, fingerprint: str, kept: Sequence[Sequence[int]]
) -> None:
    """Raise InputError unless `gate` can choose for this model with the experts `kept`."""
    require_pre_gateable(spec)
    gate.require_model(fingerprint, spec.hidden_size, spec.num_moe_layers)
    gate.for_experts(kept)


def require_pre_gateable(spec: ModelSpec) -> None:
    """Raise InputError for a model that no pre-gate can choose for."""
    require_weighable(spec.router, spec.model_type)
    if spec.num_moe_layers < 2:
        raise InputError(
            "the model has one MoE layer, which routes by itself: a pre-gate would have nothing to "
            "decide"
        )
