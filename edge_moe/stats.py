"""`ExpertStats`: what calibration measured about every expert. Additive, mergeable, fingerprinted.

On disk a folder with `stats.json` (StatsInfo) and `stats.safetensors` (integer arrays).
L is the number of MoE layers, E experts, F forms.
"""

from __future__ import annotations

import shutil
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from edge_moe.additive import AdditiveStats, Arrays
from edge_moe.errors import InputError, StatsError
from edge_moe.exact_sum import ExactSum
from edge_moe.files import require_new_output
from edge_moe.plan import CalibrationOptions

STATS_VERSION = 2

EXPERT_SUMS = (
    "gate",  # g
    "output_norm",  # |f|
    "output_square",  # |f|**2
    "gated_norm",  # g |f|
    "gated_output_square",  # g |f|**2
    "gated_square",  # (g |f|)**2
    "shifted_norm",  # s g |f|
    "router_score",  # p
    "top_score",  # p, where the expert has the largest weight
    "top_logit",  # z, where the expert has the largest raw logit, chosen or not
)
"""Per (layer, expert), summed over the tokens routed to it.

g is the weight the layer really multiplies with, f the expert's output before it, |.| the L2 norm;
z the router's raw logit, p = softmax(z) over all experts or sigmoid(z), as the router scores,
before any renormalisation or scale; s = 1 - cos(h, h + m) with h the residual stream that the MoE
output m is added to.
"""
LAYER_SUMS = ("moe_square", "residual_square")
"""Per layer, summed over tokens: |MoE output|**2 and |hidden state after the layer|**2."""


class StatsInfo(BaseModel):
    """Everything about a calibration run that must agree before two shards may be merged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int
    edge_moe_version: str
    model_type: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    data_fingerprint: str
    tasks: tuple[str, ...]
    window_tokens: int
    num_windows: int
    """Windows in the whole calibration text, over all shards."""
    windows: tuple[int, ...]
    """Windows that these sums cover, ascending."""
    num_tokens: int
    """Tokens in the covered windows; there is no padding."""
    moe_layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int
    quantiser: str = "nearest"
    """How experts were packed when their forms were measured."""
    forms: tuple[str, ...]
    """Forms whose loss was measured, in the order of `form_loss`'s last axis; `drop` is first."""
    options: CalibrationOptions | None = None
    """How it was asked for; says nothing about what was measured."""

    def _merged_options(self, other: StatsInfo) -> CalibrationOptions | None:
        if self.options is None or other.options is None:
            return None
        is_whole = len(self.windows) + len(other.windows) == self.num_windows
        shards = sorted({*self.options.shards, *other.options.shards})
        return self.options.model_copy(update={"shards": ((0, 1),) if is_whole else tuple(shards)})

    def merged(self, other: Self) -> Self:
        """The settings of both shards together.

        Raises:
            StatsError: another model, text or setting, or windows counted twice.
        """
        found = first_difference(self, other, {"windows", "num_tokens", *INCIDENTAL})
        if found is not None:
            key, one, two = found
            raise StatsError(
                f"cannot merge: {key} is {brief(one)} in one and {brief(two)} in the "
                "other: merge only shards of one run, which differ in --shard alone"
            )
        twice = sorted(set(self.windows) & set(other.windows))
        if twice:
            raise StatsError(
                f"cannot merge: window {twice[0]} is in both; give each shard another --shard"
            )
        return self.model_copy(
            update={
                "windows": tuple(sorted(self.windows + other.windows)),
                "num_tokens": self.num_tokens + other.num_tokens,
                "options": self._merged_options(other),
            }
        )


INCIDENTAL = frozenset({"edge_moe_version", "options"})
"""Fields that say nothing about what was measured."""


def first_difference(
    left: StatsInfo, right: StatsInfo, ignored: Set[str] = frozenset()
) -> tuple[str, object, object] | None:
    """(field, its value in `left`, in `right`) of one that differs; None where none does.

    Fields that a person chose come first: a fingerprint says nothing to a person, and another task
    or window changes it too.
    """
    names = [name for name in type(left).model_fields if name not in ignored]
    for name in sorted(names, key=lambda name: name.endswith("fingerprint")):
        values = getattr(left, name), getattr(right, name)
        if values[0] != values[1]:
            return name, *values
    return None


@dataclass(eq=False)
class ExpertStats(AdditiveStats[StatsInfo]):
    """Sums over calibration tokens."""

    max_output: npt.NDArray[np.float64]
    """[L, E] largest |element| of an expert's un-gated output: super experts stand out."""
    expert_sums: dict[str, ExactSum]
    """[L, E] each, keyed by `EXPERT_SUMS`."""
    layer_sums: dict[str, ExactSum]
    """[L] each, keyed by `LAYER_SUMS`."""
    form_loss: ExactSum
    """[L, E, F] sum over tokens of |change of the MoE output|**2 if only this expert is in form f.

    For a packed form that is (g |f - f_form|)**2; for `drop` it is the change after the router has
    chosen again without the expert.
    """

    STEM: ClassVar = "stats"
    INFO: ClassVar = StatsInfo
    VERSION: ClassVar = STATS_VERSION
    REMEDY: ClassVar = "run or resume `edge-moe calibrate`"

    @classmethod
    def zeros(cls, info: StatsInfo) -> Self:
        num_layers, num_experts = len(info.moe_layer_ids), info.num_experts
        shape = (num_layers, num_experts)
        return cls(
            info=info,
            routed_tokens=np.zeros(shape, np.int64),
            max_output=np.zeros(shape, np.float64),
            expert_sums={name: ExactSum.zeros(shape) for name in EXPERT_SUMS},
            layer_sums={name: ExactSum.zeros((num_layers,)) for name in LAYER_SUMS},
            form_loss=ExactSum.zeros((*shape, len(info.forms))),
        )

    def form_index(self, form: str) -> int:
        """Position of `form` on the last axis of `form_loss`.

        Raises:
            StatsError: the form was not measured.
        """
        if form not in self.info.forms:
            raise StatsError(
                f"the statistics hold no loss for form {form!r}, only for "
                f"{', '.join(self.info.forms)}: calibrate again with that form"
            )
        return self.info.forms.index(form)

    def sums(self) -> dict[str, ExactSum]:
        """Every running sum, by the name it is stored under."""
        return {
            "form_loss": self.form_loss,
            **{f"expert.{name}": total for name, total in self.expert_sums.items()},
            **{f"layer.{name}": total for name, total in self.layer_sums.items()},
        }

    def to_arrays(self) -> Arrays:
        """Flat named arrays, as stored."""
        return super().to_arrays() | {"max_output": self.max_output}

    def _add(self, arrays: Arrays) -> None:
        super()._add(arrays)
        np.maximum(self.max_output, arrays["max_output"].astype(np.float64), out=self.max_output)


def require_unfinished(output: Path) -> None:
    """Refuse an output that a calibration can neither start in nor resume.

    Raises:
        InputError: `output` holds finished statistics, or something else.
    """
    folder = output / "work"
    if (output / "stats.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        raise InputError(
            f"output {output} already holds finished statistics: "
            "choose another path or remove it first"
        )
    if not folder.exists() and not (output / "gradient.json").exists():
        require_new_output(output)


def brief(value: object) -> str:
    """`value` in one line of a message."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
