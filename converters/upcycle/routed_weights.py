"""Weights of routed experts as they are trained, and as they are used and stored.

A row is cut into runs of `group` weights. Of a run W with gamma = mean |W|:

    ternary     used = s T,  T = W / gamma, rounded to the nearest of -1, 0, 1   (arXiv:2402.17764)
    otherwise   used = s W / gamma

with one learned scale s per run, rounded to what float16 and bfloat16 both hold, so that s T is
exact in either and packs into tq1_0, tq2_0 or q2_0 without loss. Rounding and gamma count as
constants in the gradient (straight-through estimator, arXiv:1308.3432):

    dL/dW = s / gamma dL/d(used)        dL/ds = sum over the run of T dL/d(used)   (W / gamma for T)

A down_proj starts with s = 0: its expert adds nothing, whatever T is.
Letters: E experts, R rows, C columns, G = C / group runs of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Quantiser:
    """How latent weights become used ones."""

    group: int
    """Weights of a row that share a scale."""
    is_ternary: bool

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(T or W / gamma [..., R, G, group], 1 / gamma [..., R, G, 1]) of `weight` [..., R, C].

        1 / gamma is 0 where a run is all zeros.
        """
        runs = self._runs(weight)
        gamma = runs.abs().mean(-1, keepdim=True)
        inverse = torch.where(gamma > 0, 1 / gamma, 0.0)
        scaled = runs * inverse
        return (scaled.round().clamp(-1, 1) if self.is_ternary else scaled), inverse

    def stored_scale(self, scale: Tensor) -> Tensor:
        """`scale` as it is used: of ternary weights what 16 bits of either kind hold.

        They hold its half, too: forms of four levels may take a run's weights for their level 2.
        """
        if not self.is_ternary:
            return scale
        return 2 * (scale / 2).bfloat16().half().float()

    def used(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Used weights [..., R, C] of latent `weight` [..., R, C] and `scale` [..., R, G]."""
        codes, _ = self.codes(weight)
        return (codes * self.stored_scale(scale).unsqueeze(-1) + 0.0).flatten(-2)  # no -0

    def pull(self, weight: Tensor, scale: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(dL/dW [..., R, C], dL/ds [..., R, G]) from `gradient` = dL/d(used) [..., R, C]."""
        codes, inverse = self.codes(weight)
        runs = self._runs(gradient)
        pulled = runs * (self.stored_scale(scale).unsqueeze(-1) * inverse)
        return pulled.flatten(-2), (codes * runs).sum(-1)

    def _runs(self, values: Tensor) -> Tensor:
        """[..., C] -> [..., G, group]"""
        return values.reshape(*values.shape[:-1], -1, self.group)

    def fitted_scale(self, weight: Tensor) -> Tensor:
        """The scale [..., R, G] that makes used weights nearest to `weight`."""
        codes, inverse = self.codes(weight)
        runs = self._runs(weight)
        squares = codes.square().sum(-1)
        fitted = (codes * runs).sum(-1) / squares.clamp(min=torch.finfo(torch.float32).tiny)
        return torch.where((squares > 0) & (inverse[..., 0] > 0), fitted, 0.0)


class RoutedMatrix(nn.Module):
    """One projection of all experts of a layer.

    `used` are leaves: their gradients gather over the windows of a step, and `end_step` turns them
    into those of `weight` and `scale` once. Memory: three times `weight`, allocated once.
    """

    def __init__(self, dense: Tensor, num_experts: int, quantiser: Quantiser, *, is_zero: bool):
        """Every expert is `dense` [R, C] at first; with `is_zero` at the scale 0."""
        super().__init__()
        self._quantiser = quantiser
        scale = quantiser.fitted_scale(dense)
        scale = torch.zeros_like(scale) if is_zero else scale
        self.weight = nn.Parameter(dense.repeat(num_experts, 1, 1))
        """[E, R, C]"""
        self.scale = nn.Parameter(scale.repeat(num_experts, 1, 1))
        """[E, R, G]"""
        self.used = [torch.empty_like(dense).requires_grad_() for _ in range(num_experts)]
        """[R, C] of every expert."""
        self._gradient = torch.empty_like(self.weight)
        """[E, R, C] of `used`, then of `weight`."""
        self.begin_step()

    def begin_step(self) -> None:
        """`used` follows `weight` and `scale`, and has no gradient yet."""
        self._gradient.zero_()
        with torch.no_grad():
            for row, used in enumerate(self.used):
                used.copy_(self.expert(row))
                used.grad = self._gradient[row]

    def expert(self, row: int) -> Tensor:
        """Used weights [R, C] of one expert."""
        with torch.no_grad():
            return self._quantiser.used(self.weight[row], self.scale[row])

    def end_step(self) -> None:
        """Gradients of `weight` and `scale` from those of `used`; 0 where no token came by."""
        self.scale.grad = torch.zeros_like(self.scale)
        with torch.no_grad():
            for row, gradient in enumerate(self._gradient):
                of_weight, of_scale = self._quantiser.pull(
                    self.weight[row], self.scale[row], gradient
                )
                gradient.copy_(of_weight)
                self.scale.grad[row] = of_scale
        self.weight.grad = self._gradient


class _Int8(torch.autograd.Function):
    """Rows rounded to 255 levels, the largest magnitude at 127; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        largest = values.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
        step = largest / 127
        return (values / step).round() * step

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


def round_to_int8(values: Tensor) -> Tensor:
    """Each token's row [..., C] as int8 activations of its own scale would hold it."""
    rounded: Tensor = _Int8.apply(values)  # type: ignore[no-untyped-call]
    return rounded
