"""From calibration statistics to the loss that the optimiser minimises.

The unit is the sum over calibration tokens of |change of the MoE output|**2: g**2 |f - f_form|**2
for a packed form, so that dropping an expert and lowering its bits compete in one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from edge_moe.formats import DROP
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
    """How layers are weighed against each other."""

    RAW = "raw"
    """Squared change of the MoE output as it is."""
    RELATIVE = "relative"
    """Divided by the layer's sum of |hidden state after the layer|**2: later layers have larger
    residual streams, where the same change matters less."""


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
        unit = "sum over calibration tokens of |change of the MoE output|^2"
        if self.layers is LayerScale.RELATIVE:
            unit += " / sum of |hidden state after the layer|^2"
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


def loss_table(
    stats: ExpertStats,
    forms: Sequence[str],
    source_form: str,
    kind: LossKind = DEFAULT_LOSS,
) -> FloatArray:
    """[L, E, F] loss of every expert in every one of `forms`.

    `source_form` is the checkpoint's own dtype and loses nothing by definition.

    Raises:
        StatsError: the loss of a form was not measured.
    """
    measured = stats.form_loss.values()
    table = np.zeros((*measured.shape[:2], len(forms)))
    for index, form in enumerate(forms):
        if form == DROP:
            table[..., index] = _drop_loss(stats, measured, kind.drop)
        elif form != source_form:
            table[..., index] = measured[..., stats.form_index(form)]
    table[..., 0] *= kind.drop_factor if forms[0] == DROP else 1.0
    table += kind.prior_tokens * _mean_per_choice(stats, table)
    if kind.layers is LayerScale.RELATIVE:
        residual = stats.layer_sums["residual_square"].values()
        table /= np.maximum(residual, np.finfo(np.float64).tiny)[:, None, None]
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
