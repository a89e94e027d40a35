"""Second moments of what each expert is given and of what it computes inside: food for quantisers.

x [H] is the input of gate_proj and up_proj, h [I] that of down_proj. Sums run over an expert's
routed tokens, each weighted by g^a (g the token's gate for the expert). MoEQuant (arXiv:2505.03804)
has a = 1, which its code writes as tokens times sqrt(g); the loss of this package's plans,
(g |f - f_form|)^2, has a = 2. Its shared-expert weighting is not needed here: shared experts stay
as they are.

`all_tokens` sends every token through every expert while only routed outputs flow on, as
llm-compressor's moe_calibrate_all_experts does: rarely chosen experts get full-rank moments, of
text that is not theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edge_moe.converters.observe import RoutedWindow, expert_inner
from edge_moe.errors import InputError

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
    """Tokens behind the sums."""
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
    all_tokens: bool = False,
    with_hessians: bool = True,
) -> Iterator[ExpertMoments]:
    """The moments of every expert of one MoE layer in order, one at a time.

    `experts` is transformers' experts module with its weights loaded. Memory: 4 (H^2 + I^2) bytes
    for one expert's hessians, 4 W (2H + 4I) for one window's activations. Cost per token: 4HI
    operations, and 2 (H^2 + I^2) for the hessians.

    Raises:
        InputError: `all_tokens` with gates as weights: a token that was not routed has none.
    """
    if all_tokens and weighting != "none":
        raise InputError(
            f"weighting {weighting!r} needs a gate per token, and all_tokens uses tokens without "
            "one: use weighting none"
        )
    for expert_id in range(len(experts.down_proj)):
        yield expert_moments(
            experts,
            expert_id,
            windows,
            weighting=weighting,
            all_tokens=all_tokens,
            with_hessians=with_hessians,
        )


@torch.inference_mode()
def expert_moments(
    experts: Any,
    expert_id: int,
    windows: Sequence[RoutedWindow],
    *,
    weighting: Weighting = "gate",
    all_tokens: bool = False,
    with_hessians: bool = True,
) -> ExpertMoments:
    """The moments of one expert; arguments as for `layer_moments`."""
    gate_up, down = experts.gate_up_proj[expert_id], experts.down_proj[expert_id]
    hidden_size, width = down.shape
    sums = _Sums(hidden_size, with_hessians), _Sums(width, with_hessians)
    num_tokens = 0
    for window in windows:
        inputs, weights = _tokens(window, expert_id, WEIGHTINGS[weighting], all_tokens)
        if not len(inputs):
            continue
        num_tokens += len(inputs)
        inner = expert_inner(experts, inputs, gate_up)
        for total, values in zip(sums, (inputs, inner), strict=True):
            total.add(values, weights)
    outer, inner_sums = sums
    hessians = None
    if outer.hessian is not None and inner_sums.hessian is not None:
        hessians = outer.hessian.numpy(), inner_sums.hessian.numpy()
    return ExpertMoments(num_tokens, outer.squares.numpy(), inner_sums.squares.numpy(), hessians)


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


def _tokens(
    window: RoutedWindow, expert_id: int, exponent: int, all_tokens: bool
) -> tuple[Tensor, Tensor]:
    """(inputs [n, H], weights [n] float64) of the tokens that count for the expert."""
    if all_tokens:
        return window.inputs, torch.ones(len(window.inputs), dtype=torch.float64)
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
