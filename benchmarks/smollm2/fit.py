"""Closed-form fits: the router, and down_proj once the router decides what is missing.

Both are ridge regressions from sums over tokens, so tokens may come in any portions. Letters as in
`split`. The refit is the least-squares compensation known from pruning (SparseGPT, arXiv
2301.00774): the neurons that run make up for the experts that a token does not use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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

    def solve(self, ridge: float, toward: Tensor | None = None) -> Tensor:
        """The W [O, N] that minimises sum ||W x - y||^2 + r ||W - toward||^2.

        r is `ridge` times the mean square of an input, times the number of tokens; `toward`
        defaults to 0.
        """
        gram = self.gram.double()
        strength = ridge * gram.diagonal().mean()
        cross = self.cross.double()
        if toward is not None:
            cross = cross + strength * toward.T.double()
        gram = gram + strength * torch.eye(len(gram), dtype=torch.float64)
        solution: Tensor = torch.linalg.solve(gram, cross)
        return solution.T.float()

    def spread(self, weights: Tensor) -> float:
        """Root mean square over tokens and rows of `weights` [O, N] applied to the inputs."""
        squares = torch.einsum("on,nm,om->o", weights, self.gram, weights)
        return float((squares.mean() / self.num_tokens).sqrt())


def router_rows(equations: NormalEquations, ridge: float, spread: float) -> Tensor:
    """Router [E, H] whose scores order the experts by predicted energy.

    The mean over experts is taken off, which softmax does not see, and the rows are scaled so that
    scores have the root mean square `spread` over tokens: small, so that every softmax weight is
    nearly 1 / E and the experts' weights alone decide what they add.
    """
    rows = equations.solve(ridge)
    rows = rows - rows.mean(0, keepdim=True)
    return rows * (spread / equations.spread(rows))
