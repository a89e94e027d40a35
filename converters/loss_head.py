"""The end of the model: final norm, output matrix, next-token loss, and its gradient.

Logits are made a few rows at a time and never kept. Memory: the output matrix [V, H] in float32,
four chunks of logits and a few [W, H].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.gradient_memory import logit_rows
from edge_moe.converters.layer_stream import aligned
from edge_moe.gradient_stats import Labels


class OutputHead:
    """What makes logits of normed hidden states, as the model does."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Memory: the output matrix in float32.

        Raises:
            CheckpointError: it is missing or holds NaN or infinity.
        """
        spec = checkpoint.spec
        self.weight = aligned(checkpoint.read(spec.head_name))
        """[V, H]"""
        self._bias: Tensor | None = None
        if "lm_head.bias" in checkpoint.tensors:
            self._bias = aligned(checkpoint.read("lm_head.bias"))
        self._divisor, self._softcap = spec.logit_divisor, spec.logit_softcap

    def logits(self, normed: Tensor) -> Tensor:
        """[n, H] -> [n, V]"""
        logits = F.linear(normed, self.weight, self._bias)
        if self._divisor != 1.0:
            logits = logits / self._divisor
        if self._softcap:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits

    def pull(self, logits: Tensor, upstream: Tensor) -> Tensor:
        """d(loss)/d(normed) [n, H], from `logits` and d(loss)/d(logits), [n, V] each."""
        if self._softcap:
            upstream = upstream * (1 - (logits / self._softcap).square())
        pulled = upstream @ self.weight
        return pulled if self._divisor == 1.0 else pulled / self._divisor


class LossHead:
    """Sum of the next-token cross-entropies of a window, and its gradient."""

    def __init__(self, checkpoint: Checkpoint, norm: nn.Module, labels: Labels) -> None:
        """`norm` is the model's final norm, with its weights.

        Raises:
            CheckpointError: the output matrix is missing or holds NaN or infinity.
        """
        self._norm = norm
        self._labels = labels
        self._head = OutputHead(checkpoint)

    def gradient(
        self, hidden: Tensor, token_ids: Sequence[int], window_id: int
    ) -> tuple[Tensor, float]:
        """(d(loss)/d(hidden) [1, W, H], loss in nats) for `hidden` [1, W, H] of the last layer.

        `window_id` is the window's number in the whole text: it seeds the draw of labels, so that
        shards and resumed runs draw the same.
        """
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            normed = self._norm(leaf)
        upstream = torch.zeros_like(normed)
        generator = torch.Generator().manual_seed(window_id)
        next_ids = torch.as_tensor(token_ids[1:])
        step = logit_rows(len(self._head.weight))
        loss = 0.0
        for start in range(0, len(next_ids), step):
            rows = slice(start, min(start + step, len(next_ids)))
            logits = self._head.logits(normed.detach()[0, rows])
            log_sums = logits.logsumexp(dim=1)
            probabilities = logits.softmax(dim=1)
            targets = next_ids[rows]
            if self._labels == "sampled":
                targets = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            each = torch.arange(len(targets))
            loss += float((log_sums - logits[each, targets]).double().sum())
            probabilities[each, targets] -= 1
            upstream[0, rows] = self._head.pull(logits, probabilities)
        (gradient,) = torch.autograd.grad(normed, leaf, upstream)
        return gradient, loss
