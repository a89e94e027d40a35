"""Floating point operations that calibrating, transforming and packing cannot do without.

Counted are products with weights and those that a method is defined by, two operations per
multiplication and addition. Left out are attention's scores, elementwise work and searches, so
each number is a lower bound. H hidden_size, I expert_width, E experts, k top_k, N experts that
stay, L MoE layers, T tokens, V vocabulary, F lossy forms.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_moe.checkpoint import Checkpoint

_OUTSIDE_LAYERS = ("model.embed_tokens.", "lm_head.")
_REAM_COMPONENTS_TOKENS = 1024  # sampled activations that hidden units are matched by


@dataclass(frozen=True)
class Work:
    """Counts for one checkpoint."""

    dense_weights: int
    """Of all layers, routers included."""
    num_moe_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    expert_width: int
    vocab_size: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Work:
        spec = checkpoint.spec
        dense = 0
        for info in checkpoint.dense_tensors:
            if len(info.shape) == 2 and not info.name.startswith(_OUTSIDE_LAYERS):
                dense += info.shape[0] * info.shape[1]
        return cls(
            *(dense, spec.num_moe_layers, spec.num_experts, spec.top_k),
            *(spec.hidden_size, spec.expert_width, spec.vocab_size),
        )

    def forward(self, num_tokens: int) -> float:
        """All layers: T (2 dense + L k 6HI)."""
        expert = self.top_k * self._expert * self.num_moe_layers
        return num_tokens * (2 * self.dense_weights + expert)

    def statistics(self, num_tokens: int) -> float:
        """`forward`, the next-best expert (6HI), and the squares of inner activations (k 4HI)."""
        more = self._expert + self.top_k * self._inner
        return self.forward(num_tokens) + num_tokens * self.num_moe_layers * more

    def hessians(self, num_tokens: int, *, every_token: bool = False) -> float:
        """T L k (4HI + 2 (H^2 + I^2)); E in place of k where every token counts."""
        experts = self.num_experts if every_token else self.top_k
        one = self._inner + 2 * (self.hidden_size**2 + self.expert_width**2)
        return num_tokens * self.num_moe_layers * experts * one

    def gptq(self, num_forms: int = 1) -> float:
        """L E (2/3 (H^3 + I^3) + F (2IH^2 + HI^2)): one factor per input, one rounding per form."""
        hidden, width = self.hidden_size, self.expert_width
        factors = 2 / 3 * (hidden**3 + width**3)
        rounding = 2 * width * hidden**2 + hidden * width**2
        return self.num_moe_layers * self.num_experts * (factors + num_forms * rounding)

    def form_losses(self, num_tokens: int, num_forms: int) -> float:
        """T L k (1 + F) 6HI."""
        return num_tokens * self.num_moe_layers * self.top_k * (1 + num_forms) * self._expert

    def calibration(self, num_tokens: int, num_forms: int) -> float:
        """`edge-moe calibrate` with GPTQ and F lossy forms."""
        return (
            self.statistics(num_tokens)
            + self.hessians(num_tokens)
            + self.gptq(num_forms)
            + self.form_losses(num_tokens, num_forms)
        )

    def gptq_build(self, num_tokens: int) -> float:
        """The text once more, then every expert packed in its form."""
        return self.forward(num_tokens) + self.hessians(num_tokens) + self.gptq()

    def heapr(self, num_tokens: int) -> float:
        """Forward, forward again and back (3 forwards), the head both ways, the units' two sums."""
        head = 4 * self.vocab_size * self.hidden_size
        units = self.num_moe_layers * self.top_k * self._expert
        return 3 * self.forward(num_tokens) + num_tokens * (head + units)

    def dern(self, num_kept: int) -> float:
        """L (E - N) I N I 4H cosines of hidden units; clustering what was received is left out."""
        pairs = (self.num_experts - num_kept) * num_kept * self.expert_width**2
        return self.num_moe_layers * pairs * 4 * self.hidden_size

    def sub_moe(self, num_tokens: int) -> float:
        """`forward`, then every expert on every token (E 6HI) and their products (E^2 2H)."""
        count = self.num_experts
        one = count * self._expert + 2 * count**2 * self.hidden_size
        return self.forward(num_tokens) + num_tokens * self.num_moe_layers * one

    def ream(self, num_tokens: int, num_kept: int) -> float:
        """Two forwards, routed outputs once more, and per absorbed expert: activations of both on
        1024 tokens (4HI), their distances (2I^2), and principal components of 2I rows of 3H."""
        tokens, width = min(num_tokens, _REAM_COMPONENTS_TOKENS), self.expert_width
        activations = 2 * tokens * self._inner + 2 * tokens * width**2
        components = 2 * (2 * width) ** 2 * 3 * self.hidden_size + 4 / 3 * (2 * width) ** 3
        absorbed = (self.num_experts - num_kept) * (activations + components)
        routed = num_tokens * self.top_k * self._expert
        return 2 * self.forward(num_tokens) + self.num_moe_layers * (routed + absorbed)

    @property
    def _expert(self) -> int:
        """One token through one expert."""
        return 6 * self.hidden_size * self.expert_width

    @property
    def _inner(self) -> int:
        """... up to what down_proj multiplies."""
        return 4 * self.hidden_size * self.expert_width
