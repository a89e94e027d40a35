"""Second moments of what each expert is given and of what it computes inside: food for quantisers.

x [H] is the input of gate_proj and up_proj, h [I] that of down_proj. Sums run over an expert's
routed tokens, each weighted by g^a (g the token's gate for the expert). MoEQuant (arXiv:2505.03804)
has a = 1, which its code writes as tokens times sqrt(g); the loss of this package's plans,
(g |f - f_form|)^2, has a = 2. Its shared-expert weighting is not needed here: shared experts stay
as they are.

With `token_scores` every token goes through every expert, while only routed outputs flow on, as
with llm-compressor's moe_calibrate_all_experts: rarely chosen experts get full-rank moments. There
every token counts alike; here it counts by the router's score p of the expert, p^a, whether it was
chosen or not. On held-out text of the demo model that is better for rare and frequent experts
alike, and counting alike is worse than routed tokens alone for all but the rarest. Tokens then
count as (sum w)^2 / sum w^2 (Kish's effective size of a weighted sample).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edge_moe.converters.block_sums import RoutedWindow
from edge_moe.runtime.moe_block import expert_inner

Weighting = Literal["none", "gate", "gate_square"]
WEIGHTINGS: dict[Weighting, int] = {"none": 0, "gate": 1, "gate_square": 2}
"""Name -> exponent of the gate in a token's weight."""

WEIGHTING: Weighting = "gate"
"""What packing uses: tokens count by their gate, as in MoEQuant (arXiv 2505.03804)."""

FloatArray64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ExpertMoments:
    """Sums over the tokens of one expert."""

    num_tokens: int
    """Tokens behind the sums; their effective number where every token counts by its score."""
    input_squares: FloatArray64
    """[H] sum of g^a x_j^2."""
    inner_squares: FloatArray64
    """[I] sum of g^a h_j^2."""
    hessians: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None
    """Sums of g^a x x^T [H, H] and of g^a h h^T [I, I], where they were asked for."""


def layer_moments(
    experts: Any,
    windows: Sequence[RoutedWindow],
    *,
    weighting: Weighting = "gate",
    token_scores: Sequence[Tensor] | None = None,
    with_hessians: bool = True,
) -> Iterator[ExpertMoments]:
    """The moments of every expert of one MoE layer in order, one at a time.

    `experts` is transformers' experts module with its weights loaded. Memory: 4 (H^2 + I^2) bytes
    for one expert's hessians, 4 W (2H + 4I) for one window's activations. Cost per token that
    counts: 4HI operations, and 2 (H^2 + I^2) for the hessians.

    `token_scores` holds the router's scores [T, E] of every window (see `router_scores_of`): every
    token counts for every expert, by them instead of by the gates.
    """
    for expert_id in range(len(experts.down_proj)):
        yield expert_moments(
            experts,
            expert_id,
            windows,
            weighting=weighting,
            token_scores=token_scores,
            with_hessians=with_hessians,
        )


@torch.inference_mode()
def expert_moments(
    experts: Any,
    expert_id: int,
    windows: Sequence[RoutedWindow],
    *,
    weighting: Weighting = "gate",
    token_scores: Sequence[Tensor] | None = None,
    with_hessians: bool = True,
) -> ExpertMoments:
    """The moments of one expert; arguments as for `layer_moments`."""
    gate_up, down = experts.gate_up_proj[expert_id], experts.down_proj[expert_id]
    hidden_size, width = down.shape
    sums = _Sums(hidden_size, with_hessians), _Sums(width, with_hessians)
    count = _TokenCount(token_scores is not None)
    for index, window in enumerate(windows):
        scores = None if token_scores is None else token_scores[index][:, expert_id]
        inputs, weights = _tokens(window, expert_id, WEIGHTINGS[weighting], scores)
        if not len(inputs):
            continue
        count.add(weights)
        inner = expert_inner(experts, inputs, gate_up, expert_id)
        for total, values in zip(sums, (inputs, inner), strict=True):
            total.add(values, weights)
    outer, inner_sums = sums
    hessians = None
    if outer.hessian is not None and inner_sums.hessian is not None:
        hessians = outer.hessian.numpy(), inner_sums.hessian.numpy()
    return ExpertMoments(count.tokens, outer.squares.numpy(), inner_sums.squares.numpy(), hessians)


class _Sums:
    """Weighted second moments of vectors of `width` numbers."""

    def __init__(self, width: int, with_hessian: bool) -> None:
        self.squares = torch.zeros(width, dtype=torch.float64)
        self.hessian = torch.zeros(width, width) if with_hessian else None

    def add(self, values: Tensor, weights: Tensor) -> None:
        """values [n, width], weights [n]."""
        scaled = values * weights.sqrt().to(values.dtype)[:, None]
        self.squares += scaled.double().square().sum(dim=0)
        if self.hessian is not None:
            self.hessian.addmm_(scaled.T, scaled)


class _TokenCount:
    """How many tokens are behind the sums."""

    def __init__(self, is_effective: bool) -> None:
        self._is_effective = is_effective
        self._count = 0
        self._sum = self._sum_of_squares = 0.0

    def add(self, weights: Tensor) -> None:
        """weights [n] float64."""
        self._count += len(weights)
        self._sum += float(weights.sum())
        self._sum_of_squares += float(weights.square().sum())

    @property
    def tokens(self) -> int:
        if not self._is_effective:
            return self._count
        return round(self._sum**2 / self._sum_of_squares) if self._sum_of_squares else 0


def _tokens(
    window: RoutedWindow, expert_id: int, exponent: int, scores: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(inputs [n, H], weights [n] float64) of the tokens that count for the expert.

    `scores` [T] are those of the expert where every token counts.
    """
    if scores is not None:
        return window.inputs, scores.double() ** exponent
    token, slot = (window.expert_ids == expert_id).nonzero(as_tuple=True)
    return window.inputs[token], window.gates[token, slot].double() ** exponent


def moment_arguments(moments: ExpertMoments) -> dict[str, Any]:
    """Keyword arguments of `pack_expert_with`."""
    return {
        "input_squares": moments.input_squares,
        "inner_squares": moments.inner_squares,
        "hessians": moments.hessians,
        "routed_tokens": moments.num_tokens,
    }
