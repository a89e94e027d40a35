"""From calibration statistics to the loss that the optimiser minimises.

The unit is the sum over calibration tokens of |change of the MoE output|**2: g**2 |f - f_form|**2
for a packed form, so that dropping an expert and lowering its bits compete in one number. With
gradient statistics the change is weighed by what it does to the language-model loss instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from edge_moe.errors import StatsError
from edge_moe.formats import DROP, EXACT
from edge_moe.gradient_stats import FormCost, GradientStats
from edge_moe.stats import ExpertStats

FloatArray = npt.NDArray[np.float64]


class DropLoss(StrEnum):
    """What dropping an expert is taken to cost."""

    REROUTE = "reroute"
    """The change of the output after the router has chosen again without it (measured): right when
    the experts that take over are still there."""
    ZERO = "zero"
    """(g |f|)**2, the change if its output became zero: right when they are gone as well."""
    MAX = "max"
    MEAN = "mean"


class LayerScale(StrEnum):
    """How a change of the MoE output is weighed, so that layers can be compared."""

    RAW = "raw"
    """Squared change of the MoE output as it is."""
    RELATIVE = "relative"
    """Divided by the layer's sum of |hidden state after the layer|**2: later layers have larger
    residual streams, where the same change matters less."""
    FIRST_ORDER = "first-order"
    """`FormCost.FIRST_ORDER`: by the loss gradient, in nats squared. Dropping costs that, or its
    squared change times the layer's mean squared gradient if that is more: an expert that hardly
    mattered alone may do so once others are gone."""
    DIAGONAL = "diagonal"
    """The same, packed forms by `FormCost.DIAGONAL`, as in GEMQ (arXiv 2605.23078)."""

    @property
    def needs_gradients(self) -> bool:
        return self in _FORM_COSTS


_FORM_COSTS = {
    LayerScale.FIRST_ORDER: FormCost.FIRST_ORDER,
    LayerScale.DIAGONAL: FormCost.DIAGONAL,
}
_UNITS = {
    LayerScale.RAW: "sum over calibration tokens of |change of the MoE output|^2",
    LayerScale.RELATIVE: "sum over calibration tokens of |change of the MoE output|^2 "
    "/ sum of |hidden state after the layer|^2",
    LayerScale.FIRST_ORDER: "nats^2, sum over calibration tokens of "
    "(loss gradient . change of the MoE output)^2",
    LayerScale.DIAGONAL: "nats^2, sum over calibration tokens and elements of "
    "(loss gradient x change of the MoE output)^2",
}
_DROP_UNIT = (
    ", dropping by its first-order cost or the layer's mean squared gradient x |change|^2, "
    "whichever is more"
)


@dataclass(frozen=True)
class LossKind:
    """One variant of the loss."""

    drop: DropLoss = DropLoss.REROUTE
    layers: LayerScale = LayerScale.RELATIVE
    drop_factor: float = 4.0
    """Dropping costs this many times what was measured: each expert was measured with all others
    present, but a plan drops several, and the next-best expert may be gone as well."""
    prior_tokens: float = 16.0
    """Every expert is taken to have been chosen for this many more tokens, at its layer's mean loss
    per choice: an expert that the calibration text hardly used is not free to lose."""

    @property
    def name(self) -> str:
        """Short, for tables."""
        parts = [self.drop.value, self.layers.value]
        return f"{' '.join(parts)}, drop x {self.drop_factor:g}, prior {self.prior_tokens:g}"

    @property
    def unit(self) -> str:
        """The unit, in words, as stored in plans."""
        unit = _UNITS[self.layers] + (_DROP_UNIT if self.layers.needs_gradients else "")
        if self.prior_tokens:
            unit += f", {self.prior_tokens:g} tokens of the layer's mean added to every expert"
        if self.drop_factor != 1:
            unit += f", dropping times {self.drop_factor:g}"
        if self.drop is DropLoss.REROUTE:
            return unit + ", dropping measured with re-routing"
        names = {"zero": "its output set to zero", "max": "the worse", "mean": "the mean"}
        suffix = "" if self.drop is DropLoss.ZERO else " of re-routing and a zero output"
        return f"{unit}, dropping counted as {names[self.drop]}{suffix}"


DEFAULT_LOSS = LossKind()
"""Of the eight variants the one whose plans diverged least (KL) on held-out text of the demo model:
code, prose, facts, arithmetic. About equal to RAW at 20-30 % of the experts' bytes, 6-64 % below it
at 7-14 % in 11 of 12 cases. ZERO prunes more: it sees the harm of dropping, but not its repair."""

GRADIENT_LOSS = LossKind(layers=LayerScale.FIRST_ORDER, drop_factor=1.0)
"""Where there are gradient statistics. On the demo model (code, prose, arithmetic, facts; 25, 12.5
and 10 % of the experts' bytes) the KL divergence of its plans on held-out text is 0.92 times that
of `DEFAULT_LOSS`' (geometric mean), less in 10 of 12 cells, more in one where both are near 0:
0.97 on the half of the text that chose this kind, 0.87 on the other. DIAGONAL: 0.95. Dropping
counts the larger of two costs already: with a drop factor of 2 it is 0.99, with 4 1.08."""


def loss_table(
    stats: ExpertStats,
    forms: Sequence[str],
    source_form: str | Sequence[str],
    kind: LossKind = DEFAULT_LOSS,
    gradients: GradientStats | None = None,
) -> FloatArray:
    """[L, E, F] loss of every expert in every one of `forms`.

    `source_form` is what the model is stored in, for all layers or [L], and loses nothing by
    definition. A form that some layers are stored in and that was not measured counts as lossless
    in the others too: the caller does not allow it there.

    Raises:
        StatsError: the loss of a form was not measured, or `kind` needs gradients and there are
            none.
    """
    stored = [source_form] if isinstance(source_form, str) else list(source_form)
    if not kind.layers.needs_gradients:
        table = _change_table(stats, forms, stored, kind.drop)
    elif len(set(stored)) > 1:
        raise StatsError(
            "layers that are stored in different forms cannot be planned with gradient statistics: "
            "calibrate without --gradients"
        )
    elif gradients is not None:
        table = _gradient_table(stats, forms, stored[0], kind, gradients)
    else:
        raise StatsError(
            f"the {kind.layers} loss needs gradient statistics, and there are none: run "
            "`edge-moe calibrate --gradients`"
        )
    table[..., 0] *= kind.drop_factor if forms[0] == DROP else 1.0
    table += kind.prior_tokens * _mean_per_choice(stats, table)
    if kind.layers is LayerScale.RELATIVE:
        residual = stats.layer_sums["residual_square"].values()
        table /= np.maximum(residual, np.finfo(np.float64).tiny)[:, None, None]
    return table


def _change_table(
    stats: ExpertStats, forms: Sequence[str], stored: Sequence[str], drop: DropLoss
) -> FloatArray:
    """[L, E, F] sum of |change of the MoE output|**2; `stored` holds one form, or [L]."""
    measured = stats.form_loss.values()
    table = np.zeros((*measured.shape[:2], len(forms)))
    for index, form in enumerate(forms):
        is_lossless = np.array([form == own for own in stored])[:, None]  # [1 or L, 1]
        if form == DROP:
            table[..., index] = _drop_loss(stats, measured, drop)
        elif form != EXACT and (not is_lossless.any() or form in stats.info.forms):
            loss = measured[..., stats.form_index(form)]
            table[..., index] = np.where(is_lossless, 0.0, loss)
    return table


def _gradient_table(
    stats: ExpertStats,
    forms: Sequence[str],
    source_form: str,
    kind: LossKind,
    gradients: GradientStats,
) -> FloatArray:
    """[L, E, F] change of the MoE output weighed by the loss gradient, in nats squared."""
    table = gradients.cost_table(forms, source_form, _FORM_COSTS[kind.layers])
    if DROP in forms:
        change = _drop_loss(stats, stats.form_loss.values(), kind.drop)
        spread = gradients.layer_weight()[:, None] * change
        alone = gradients.cost_table((DROP,), source_form, FormCost.FIRST_ORDER)[..., 0]
        table[..., forms.index(DROP)] = np.maximum(spread, alone)
    return table


def _mean_per_choice(stats: ExpertStats, table: FloatArray) -> FloatArray:
    """[L, 1, F] the layer's mean loss per routed token, over all of its experts."""
    routed = np.maximum(stats.routed_tokens.sum(axis=1), 1)
    mean: FloatArray = table.sum(axis=1, keepdims=True) / routed[:, None, None]
    return mean


def _drop_loss(stats: ExpertStats, measured: FloatArray, kind: DropLoss) -> FloatArray:
    zero = stats.expert_sums["gated_square"].values()
    if kind is DropLoss.ZERO:
        return zero
    rerouted: FloatArray = measured[..., stats.form_index(DROP)]
    if kind is DropLoss.REROUTE:
        return rerouted
    if kind is DropLoss.MAX:
        return np.maximum(rerouted, zero)
    return (rerouted + zero) / 2
