"""The router in closed form, and how far its scores may tilt the experts' weights.

It is a ridge regression from sums over tokens, so tokens may come in any portions. Letters as in
`split_neurons`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from edge_moe.errors import CheckpointError

_LEAST_RIDGE = 1e-9
"""What float64 tells from 0 in a sum of squares."""


@dataclass
class NormalEquations:
    """Sums over tokens for a map W x = y: `gram` [N, N] of x x^T, `cross` [N, O] of x y^T."""

    gram: Tensor
    cross: Tensor
    num_tokens: int = 0

    @classmethod
    def zeros(cls, num_inputs: int, num_outputs: int) -> NormalEquations:
        return cls(torch.zeros(num_inputs, num_inputs), torch.zeros(num_inputs, num_outputs))

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in `inputs` [T, N] and `outputs` [T, O]."""
        self.gram.addmm_(inputs.T, inputs)
        self.cross.addmm_(inputs.T, outputs)
        self.num_tokens += len(inputs)

    def solve(self, ridge: float) -> Tensor:
        """The W [O, N] that minimises sum ||W x - y||^2 + r ||W||^2.

        r is `ridge` times the mean square of an input, times the number of tokens, and never 0, so
        that inputs which are always 0 or alike have a solution too.
        """
        gram = self.gram.double()
        strength = max(ridge, _LEAST_RIDGE) * float(gram.diagonal().mean()) or 1.0
        gram = gram + strength * torch.eye(len(gram), dtype=torch.float64)
        solution: Tensor = torch.linalg.solve(gram, self.cross.double())
        return solution.T.float()

    def spread(self, weights: Tensor) -> float:
        """Root mean square over tokens and rows of `weights` [O, N] applied to the inputs."""
        squares = torch.einsum("on,nm,om->o", weights, self.gram, weights)
        mean = squares.mean().clamp(min=0)  # which rounding may leave just below
        return float((mean / max(1, self.num_tokens)).sqrt())


def router_rows(equations: NormalEquations, ridge: float, spread: float) -> Tensor:
    """Router [E, H] whose scores order the experts by predicted energy.

    The mean over experts is taken off, which softmax does not see, and the rows are scaled so that
    scores have the root mean square `spread` over tokens: small, so that every softmax weight is
    nearly 1 / E and the experts' weights alone decide what they add. Where nothing tells experts
    apart, as in a layer that adds nothing, they are 0.

    Raises:
        CheckpointError: the sums are not finite.
    """
    rows = equations.solve(ridge)
    rows = rows - rows.mean(0, keepdim=True)
    found = equations.spread(rows)
    if not math.isfinite(found):
        raise CheckpointError(
            "a feed-forward layer computes no finite strengths of its neurons: the dense model is "
            "damaged: download it again"
        )
    return rows * (spread / found) if found else torch.zeros_like(rows)


def score_reach(rows: Tensor, norm_weight: Tensor, *, is_softmax: bool) -> float:
    """The most by which scores can differ (softmax), or be other than 0 (sigmoid).

    The router [E, H] reads an RMS norm with weight g [H], so |x / g| <= sqrt(H) for every input,
    and |(r_e - r_f) x| <= |(r_e - r_f) * g| sqrt(H).
    """
    scaled = rows.double() * norm_weight.double()
    if is_softmax:
        lengths = torch.linalg.vector_norm(scaled[:, None] - scaled[None], dim=2)
    else:
        lengths = torch.linalg.vector_norm(scaled, dim=1)
    return float(lengths.max()) * math.sqrt(rows.shape[1])


def tilt_bound(rows: Tensor, norm_weight: Tensor, *, is_softmax: bool) -> float:
    """How far an expert's weight can stray from that of equal scores, as a share of it.

    With d = `score_reach`, every softmax weight lies between exp(-d) / E and exp(d) / E, every
    sigmoid between (1 - tanh(d / 2)) / 2 and (1 + tanh(d / 2)) / 2.
    """
    reach = score_reach(rows, norm_weight, is_softmax=is_softmax)
    return math.expm1(reach) if is_softmax else math.tanh(reach / 2)


def bounded_rows(rows: Tensor, norm_weight: Tensor, max_tilt: float, *, is_softmax: bool) -> Tensor:
    """`rows` times the factor for which `tilt_bound` is just below `max_tilt`; order is kept.

    Rows that tell no experts apart stay. The result is exact in bfloat16.
    """
    reach = score_reach(rows, norm_weight, is_softmax=is_softmax)
    if reach == 0:
        return rows
    wanted = math.log1p(max_tilt) if is_softmax else 2 * math.atanh(max_tilt)
    return (rows * (0.99 * wanted / reach)).bfloat16().float()  # 1 % for rounding
