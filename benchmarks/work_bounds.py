"""Floating point operations that calibrating, transforming and packing cannot do without.

Counted are products with weights and those that a method is defined by, two operations per
multiplication and addition. Left out are attention's scores, elementwise work and searches, so
each number is a lower bound. A gradient that is pulled through a frozen matrix costs as much as the
product with it. H hidden_size, I expert_width, E experts, k top_k, N experts that stay, L MoE
layers, T tokens, V vocabulary, F lossy forms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.transforms.naee import MAX_ENUMERATED_EXPERTS

_OUTSIDE_LAYERS = ("model.embed_tokens.", "lm_head.")
_FIRST_LAYER = "model.layers.0."
_BRANCHED = ".self_attn.o_proj.weight"
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
    num_groups: int = 1
    """Router groups, which keep equally many experts each."""
    first_layer_weights: int = 0
    """Dense weights of the first layer, which no gradient needs to pass."""
    branch_sides: int = 0
    """Inputs and outputs of all attention output projections, which recovery puts branches on."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Work:
        spec = checkpoint.spec
        matrices = {
            info.name: info.shape
            for info in checkpoint.dense_tensors
            if len(info.shape) == 2 and not info.name.startswith(_OUTSIDE_LAYERS)
        }
        first = [shape for name, shape in matrices.items() if name.startswith(_FIRST_LAYER)]
        return cls(
            *(sum(map(math.prod, matrices.values())), spec.num_moe_layers, spec.num_experts),
            *(spec.top_k, spec.hidden_size, spec.expert_width, spec.vocab_size),
            num_groups=spec.router.num_groups,
            first_layer_weights=sum(map(math.prod, first)),
            branch_sides=sum(sum(shape) for name, shape in matrices.items() if _BRANCHED in name),
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

    def calibration_with_gradients(self, num_tokens: int, num_forms: int) -> float:
        """`calibrate --gradients`: all of `heapr` and of `calibration`, the next-best expert (6HI).

        The gradient pass runs every layer forward, again, and back; it also measures the forms,
        whose losses the plain pass then takes over, and what dropping costs, for which it needs the
        next-best expert once more.
        """
        next_best = num_tokens * self.num_moe_layers * self._expert
        gradients = self.heapr(num_tokens) + next_best
        return gradients + self.calibration(num_tokens, num_forms)

    def gptq_build(self, num_tokens: int) -> float:
        """The text once more, then every expert packed in its form."""
        return self.forward(num_tokens) + self.hessians(num_tokens) + self.gptq()

    def heapr(self, num_tokens: int) -> float:
        """Forward, forward again and back (3 forwards), the head both ways, the units' two sums."""
        head = 2 * self._head
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

    def naee(self, num_tokens: int, num_kept: int) -> float:
        """`forward`, every expert on every token (E 6HI), each pair's inner product (E (E + 1) H),
        and per set of kept experts k (k + 3): how far the output changes is a sum of k (k + 1) / 2
        inner products and k products with the old output, each times a weight.

        The code takes float64 and both halves of the symmetric products. Routing each token anew
        among the kept experts of every set is a search, which is left out.
        """
        experts = self.num_experts * self._expert
        pairs = self.num_experts * (self.num_experts + 1) * self.hidden_size
        sets = self._num_kept_sets(num_kept) * self.top_k * (self.top_k + 3)
        layer = num_tokens * (experts + pairs + sets)
        return self.forward(num_tokens) + self.num_moe_layers * layer

    def _num_kept_sets(self, num_kept: int) -> int:
        """Sets that NAEE compares in one layer: all, or the candidates of every elimination."""
        size, kept = self.num_experts // self.num_groups, num_kept // self.num_groups
        if self.num_experts <= MAX_ENUMERATED_EXPERTS:
            return math.prod([math.comb(size, kept)] * self.num_groups)
        return sum(self.num_groups * left for left in range(size, kept, -1))

    def m_smoe(self, num_tokens: int, num_kept: int) -> float:
        """`forward`, cosines of the router logits' columns (T E (E + 1)), and per merged expert the
        products of both experts' hidden units (6HI^2). Matching them is a search, left out."""
        columns = num_tokens * self.num_experts * (self.num_experts + 1)
        units = (self.num_experts - num_kept) * self._expert * self.expert_width
        return self.forward(num_tokens) + self.num_moe_layers * (columns + units)

    def recover_routers(self, num_tokens: int) -> float:
        """Three forwards and per layer three router passes (2EH).

        The original runs once; every shrunken layer runs for its router's inputs and again with the
        new rows. The router itself answers for the original, before and after the fit. The fit's
        own passes are left out: how many L-BFGS takes, up to 125, is not known beforehand.
        """
        routers = self.num_moe_layers * 2 * self.num_experts * self.hidden_size
        return 3 * self.forward(num_tokens) + 3 * num_tokens * routers

    def recover_branches(
        self, num_tokens: int, learned_tokens: int, judged_tokens: int, rank: int
    ) -> float:
        """The original's forward and head (2VH) on T tokens; the student's forward, head and
        branches (2r per side) on what is learned and judged; and for what is learned the way back
        through the head, all layers (without the first one's dense part, below which nothing is
        trained) and to the branches' own factors (2r per side).

        `learned_tokens` and `judged_tokens` count a window as often as it is run.
        """
        branches = 2 * rank * self.branch_sides
        teacher = self.forward(num_tokens) + num_tokens * self._head
        student = learned_tokens + judged_tokens
        forward = self.forward(student) + student * (self._head + branches)
        frozen = self._head + branches - 2 * self.first_layer_weights
        return teacher + forward + self.forward(learned_tokens) + learned_tokens * frozen

    @property
    def _head(self) -> int:
        """Logits of one token."""
        return 2 * self.vocab_size * self.hidden_size

    @property
    def _expert(self) -> int:
        """One token through one expert."""
        return 6 * self.hidden_size * self.expert_width

    @property
    def _inner(self) -> int:
        """... up to what down_proj multiplies."""
        return 4 * self.hidden_size * self.expert_width
