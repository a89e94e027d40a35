"""`GradientStats`: what the language-model loss says about every expert. Additive, mergeable.

On disk, in a folder that may also hold `ExpertStats`: `gradient.json` (GradientInfo) and
`gradient.safetensors` (integer arrays). L MoE layers, E experts, F forms, I expert_width,
H hidden_size, T tokens.

The gradient of a token is g = d(loss)/d(output of the MoE block), [H]. The loss is the *sum* of the
next-token cross-entropies of the token's window, in nats: every token then counts the same,
however long its window. Papers take the mean over all tokens, which divides every quantity
here by the same constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field

from edge_moe.additive import AdditiveStats
from edge_moe.errors import StatsError
from edge_moe.exact_sum import ExactSum
from edge_moe.formats import DROP, EXACT
from edge_moe.stats import INCIDENTAL, StatsInfo, brief, first_difference

GRADIENT_VERSION = 2
FloatArray = npt.NDArray[np.float64]
Labels = Literal["text", "sampled"]


class FormCost(StrEnum):
    """How a change dz of the MoE block's output is weighed by the gradient g, summed over tokens.

    dz is gate * (f_form - f) for a packed form, and for `drop` the change after the router has
    chosen again without the expert.
    """

    OUTPUT_CHANGE = "output_change"
    """|dz|**2, whatever the gradient: what `ExpertStats.form_loss` holds."""
    DIAGONAL = "diagonal"
    """sum_j (g_j dz_j)**2: GEMQ (arXiv 2605.23078), E[dz^T diag(g g^T) dz]."""
    FIRST_ORDER = "first_order"
    """(g . dz)**2: the squared first-order change of the loss, dz^T (g g^T) dz. With labels drawn
    from the model itself its mean is twice the KL divergence that dz at this token alone causes."""


NEURON_SUMS = ("hidden_square", "gradient_square")
"""Per neuron, summed over routed tokens: h**2, and (gate * g . w)**2; w is its down_proj column."""


class GradientInfo(StatsInfo):
    """Everything about a gradient run that must agree before two shards may be merged."""

    labels: Labels
    """`text`: the token that really follows; `sampled`: one drawn from the model's prediction."""
    hidden_size: int = Field(gt=0)
    expert_width: int = Field(gt=0)

    @property
    def num_predictions(self) -> int:
        """Predicted tokens: all but the first of every window."""
        return self.num_tokens - len(self.windows)

    def require_same_run(self, stats: StatsInfo) -> None:
        """Refuse to be used with statistics of something else.

        Raises:
            StatsError: another model, text, window, form or way of packing.
        """
        found = first_difference(stats, self, {"version", *INCIDENTAL})
        if found is not None:
            name, wanted, other = found
            raise StatsError(
                f"the gradients do not belong to the statistics: {name} is {brief(other)} in one "
                f"and {brief(wanted)} in the other: calibrate --gradients into a new folder"
            )


@dataclass(eq=False)
class GradientStats(AdditiveStats[GradientInfo]):
    """Sums over calibration tokens."""

    form_cost: dict[FormCost, ExactSum]
    """[L, E, F] each, in nats squared where the gradient plays a part."""
    neuron: dict[str, ExactSum]
    """[L, E, I] each, keyed by `NEURON_SUMS`."""
    gradient_square: ExactSum
    """[L] sum over all tokens of |g|**2."""
    loss_nats: ExactSum
    """[1] cross-entropy of all predicted tokens."""

    STEM: ClassVar = "gradient"
    INFO: ClassVar = GradientInfo
    VERSION: ClassVar = GRADIENT_VERSION
    REMEDY: ClassVar = "run `edge-moe calibrate --gradients`"

    @classmethod
    def zeros(cls, info: GradientInfo) -> Self:
        experts = len(info.moe_layer_ids), info.num_experts
        return cls(
            info=info,
            routed_tokens=np.zeros(experts, np.int64),
            form_cost={kind: ExactSum.zeros((*experts, len(info.forms))) for kind in FormCost},
            neuron={name: ExactSum.zeros((*experts, info.expert_width)) for name in NEURON_SUMS},
            gradient_square=ExactSum.zeros(experts[:1]),
            loss_nats=ExactSum.zeros((1,)),
        )

    def cost_table(self, forms: Sequence[str], source_form: str, kind: FormCost) -> FloatArray:
        """[L, E, F] cost of every expert in every one of `forms`.

        `source_form` is the checkpoint's own dtype and costs nothing by definition.

        Raises:
            StatsError: the cost of a form was not measured.
        """
        known = (*self.info.forms, source_form, EXACT)
        missing = [form for form in forms if form not in known]
        if missing:
            raise StatsError(
                f"the gradient statistics hold no cost for form {missing[0]!r}, only for "
                f"{', '.join(self.info.forms)}: measure again with that form"
            )
        measured = self.form_cost[kind].values()
        table = np.zeros((*measured.shape[:2], len(forms)))
        for index, form in enumerate(forms):
            if form not in (source_form, EXACT):
                table[..., index] = measured[..., self.info.forms.index(form)]
        return table

    def packed_loss(self) -> ExactSum:
        """[L, E, F] `ExpertStats.form_loss` of all forms but `drop`, which is 0."""
        changes, drop = self.form_cost[FormCost.OUTPUT_CHANGE], self.info.forms.index(DROP)
        high, low = changes.high.copy(), changes.low.copy()
        high[..., drop] = low[..., drop] = 0
        return ExactSum(high, low)

    def layer_weight(self) -> FloatArray:
        """[L] mean squared gradient per element, sum |g|**2 / (T H): makes layers comparable.

        If g were spread evenly and independent of dz, the first-order cost of a form would be this
        weight times sum |dz|**2.
        """
        num_elements = self.info.num_tokens * self.info.hidden_size
        return self.gradient_square.values() / num_elements

    def neuron_scores(self) -> FloatArray:
        """[L, E, I] HEAPr saliency (arXiv 2509.22299) of every neuron; -1 if never routed.

        s = 1/2 mean(h**2) (w^T G w), G = mean(g g^T) over the expert's tokens, g the gradient at
        the expert's own output (the gate is in it). w^T G w is summed as mean((g . w)**2), so that
        G, [H, H] per expert, is never stored and shards merge exactly.
        """
        hidden, gradient = (self.neuron[name].values() for name in NEURON_SUMS)
        count = np.maximum(self.routed_tokens, 1)[..., None]
        scores = hidden / count * (gradient / count) / 2
        return np.where(self.routed_tokens[..., None] > 0, scores, -1.0)

    def sums(self) -> dict[str, ExactSum]:
        """Every running sum, by the name it is stored under."""
        return {
            **{f"form.{kind}": total for kind, total in self.form_cost.items()},
            **{f"neuron.{name}": total for name, total in self.neuron.items()},
            "gradient_square": self.gradient_square,
            "loss_nats": self.loss_nats,
        }


def load_gradients(folder: Path, stats: StatsInfo) -> GradientStats | None:
    """The gradient statistics in `folder`, which belong to `stats`; None where there are none.

    Raises:
        StatsError: damaged, or of something else.
    """
    if not GradientStats.settings_path(folder).exists():
        return None
    found = GradientStats.load(folder)
    found.info.require_same_run(stats)
    return found


def merge_gradients(folders: Sequence[Path]) -> GradientStats | None:
    """The gradient statistics of all `folders` together; None where no folder has any.

    Raises:
        StatsError: only some folders have them, or they do not belong together.
    """
    with_gradients = [each for each in folders if GradientStats.settings_path(each).exists()]
    without = [each for each in folders if each not in with_gradients]
    if with_gradients and without:
        raise StatsError(
            f"cannot merge: {with_gradients[0]} holds loss gradients and {without[0]} none: "
            f"calibrate {without[0]} with --gradients, or remove gradient.json from the others"
        )
    merged: GradientStats | None = None
    for folder in with_gradients:
        part = GradientStats.load(folder)
        merged = part if merged is None else merged.merge(part)
    return merged
