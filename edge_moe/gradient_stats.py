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
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from safetensors.numpy import save_file

from edge_moe.errors import StatsError
from edge_moe.exact_sum import ExactSum
from edge_moe.files import atomic_path, write_text
from edge_moe.stats import StatsInfo, load_sums

GRADIENT_VERSION = 1
FloatArray = npt.NDArray[np.float64]
Labels = Literal["text", "sampled"]


class FormCost(StrEnum):
    """How a change dz of the MoE block's output is weighed by the gradient g, summed over tokens.

    dz is gate * (f_form - f) for a packed form, and for `drop` the change after the router has
    chosen again without the expert.
    """

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


@dataclass(eq=False)
class GradientStats:
    """Sums over calibration tokens."""

    info: GradientInfo
    routed_tokens: npt.NDArray[np.int64]
    """[L, E] tokens that chose the expert."""
    form_cost: dict[FormCost, ExactSum]
    """[L, E, F] each, in nats squared."""
    neuron: dict[str, ExactSum]
    """[L, E, I] each, keyed by `NEURON_SUMS`."""
    gradient_square: ExactSum
    """[L] sum over all tokens of |g|**2."""
    loss_nats: ExactSum
    """[1] cross-entropy of all predicted tokens."""

    @classmethod
    def zeros(cls, info: GradientInfo) -> GradientStats:
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
        missing = [form for form in forms if form not in (*self.info.forms, source_form)]
        if missing:
            raise StatsError(
                f"the gradient statistics hold no cost for form {missing[0]!r}, only for "
                f"{', '.join(self.info.forms)}: measure again with that form"
            )
        measured = self.form_cost[kind].values()
        table = np.zeros((*measured.shape[:2], len(forms)))
        for index, form in enumerate(forms):
            if form != source_form:
                table[..., index] = measured[..., self.info.forms.index(form)]
        return table

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

    def merge(self, other: GradientStats) -> GradientStats:
        """The statistics of both shards: bit for bit what one run over both gives.

        Raises:
            StatsError: another model, text or setting, or windows counted twice.
        """
        merged = GradientStats.zeros(self.info.merged(other.info))
        sums = merged._sums()
        for part in (self, other):
            merged.routed_tokens += part.routed_tokens
            for name, found in part._sums().items():
                sums[name].merge(found)
        return merged

    def _sums(self) -> dict[str, ExactSum]:
        """Every running sum, by the name it is stored under."""
        return {
            **{f"form.{kind}": total for kind, total in self.form_cost.items()},
            **{f"neuron.{name}": total for name, total in self.neuron.items()},
            "gradient_square": self.gradient_square,
            "loss_nats": self.loss_nats,
        }

    def to_arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Flat named arrays, as stored."""
        limbs = {name: total.limbs() for name, total in self._sums().items()}
        return {"routed_tokens": self.routed_tokens, **limbs}

    @classmethod
    def from_arrays(
        cls, info: GradientInfo, arrays: dict[str, npt.NDArray[np.generic]]
    ) -> GradientStats:
        """Inverse of `to_arrays`.

        Raises:
            StatsError: an array is missing or has another shape or dtype.
        """
        found = cls.zeros(info)
        for name, wanted in found.to_arrays().items():
            array = arrays.get(name)
            if array is None or array.shape != wanted.shape or array.dtype != wanted.dtype:
                raise StatsError(
                    f"gradient statistics are damaged: array {name!r} is missing or misshapen"
                )
        found.routed_tokens += arrays["routed_tokens"].astype(np.int64)
        for name, total in found._sums().items():
            total.merge(ExactSum.from_limbs(arrays[name].astype(np.int64)))
        return found

    def save(self, folder: Path) -> None:
        """Write both files atomically; `gradient.json` comes last and marks them complete."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / "gradient.safetensors") as temporary:
            save_file(self.to_arrays(), temporary)
        write_text(folder / "gradient.json", self.info.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> GradientStats:
        """Read what `save` wrote.

        Raises:
            StatsError: missing, incomplete, damaged, or written by another version.
        """
        remedy = "measure the gradients first"
        info, arrays = load_sums(folder, "gradient", GradientInfo, GRADIENT_VERSION, remedy)
        return cls.from_arrays(info, arrays)
