"""`ExpertStats`: what calibration measured about every expert. Additive, mergeable, fingerprinted.

On disk a folder with `stats.json` (StatsInfo) and `stats.safetensors` (integer arrays).
L is the number of MoE layers, E experts, F forms.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edge_moe.errors import InputError, StatsError
from edge_moe.exact_sum import ExactSum
from edge_moe.files import atomic_path, read_json, require_new_output, write_text
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

    def merge_key(self) -> dict[str, object]:
        """The fields that must be equal for two shards to merge; what a person chose comes first.

        A fingerprint says nothing to a person, and another task or window changes it too.
        """
        unlike = {"windows", "num_tokens", "edge_moe_version", "options"}
        fields = self.model_dump(exclude=unlike)
        return dict(sorted(fields.items(), key=lambda field: field[0].endswith("fingerprint")))

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
        for key, value in self.merge_key().items():
            found = other.merge_key()[key]
            if found != value:
                raise StatsError(
                    f"cannot merge: {key} is {_brief(value)} in one and {_brief(found)} in the "
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


@dataclass(eq=False)
class ExpertStats:
    """Sums over calibration tokens."""

    info: StatsInfo
    routed_tokens: npt.NDArray[np.int64]
    """[L, E] tokens that chose the expert."""
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

    @classmethod
    def zeros(cls, info: StatsInfo) -> ExpertStats:
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

    def merge(self, other: ExpertStats) -> ExpertStats:
        """The statistics of both shards: bit for bit what one run over both gives.

        Raises:
            StatsError: another model, text or setting, or windows counted twice.
        """
        merged = ExpertStats.zeros(self.info.merged(other.info))
        for part in (self, other):
            merged._accumulate(part)
        return merged

    def _accumulate(self, part: ExpertStats) -> None:
        self.routed_tokens += part.routed_tokens
        np.maximum(self.max_output, part.max_output, out=self.max_output)
        for name in EXPERT_SUMS:
            self.expert_sums[name].merge(part.expert_sums[name])
        for name in LAYER_SUMS:
            self.layer_sums[name].merge(part.layer_sums[name])
        self.form_loss.merge(part.form_loss)

    def to_arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Flat named arrays, as stored."""
        arrays: dict[str, npt.NDArray[np.generic]] = {
            "routed_tokens": self.routed_tokens,
            "max_output": self.max_output,
            "form_loss": self.form_loss.limbs(),
        }
        arrays |= {f"expert.{name}": total.limbs() for name, total in self.expert_sums.items()}
        arrays |= {f"layer.{name}": total.limbs() for name, total in self.layer_sums.items()}
        return arrays

    @classmethod
    def from_arrays(
        cls, info: StatsInfo, arrays: dict[str, npt.NDArray[np.generic]]
    ) -> ExpertStats:
        """Inverse of `to_arrays`.

        Raises:
            StatsError: an array is missing or has another shape or dtype.
        """
        for name, wanted in cls.zeros(info).to_arrays().items():
            found = arrays.get(name)
            if found is None or found.shape != wanted.shape or found.dtype != wanted.dtype:
                raise StatsError(f"statistics are damaged: array {name!r} is missing or misshapen")

        def limbs(name: str) -> ExactSum:
            return ExactSum.from_limbs(arrays[name].astype(np.int64))

        return cls(
            info=info,
            routed_tokens=arrays["routed_tokens"].astype(np.int64),
            max_output=arrays["max_output"].astype(np.float64),
            expert_sums={name: limbs(f"expert.{name}") for name in EXPERT_SUMS},
            layer_sums={name: limbs(f"layer.{name}") for name in LAYER_SUMS},
            form_loss=limbs("form_loss"),
        )

    def save(self, folder: Path) -> None:
        """Write both files atomically; `stats.json` comes last and marks the folder complete."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / "stats.safetensors") as temporary:
            save_file(self.to_arrays(), temporary)
        write_text(folder / "stats.json", self.info.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> ExpertStats:
        """Read what `save` wrote.

        Raises:
            StatsError: missing, incomplete, damaged, or written by another version.
        """
        remedy = "run or resume `edge-moe calibrate`"
        info, arrays = load_sums(folder, "stats", StatsInfo, STATS_VERSION, remedy)
        return cls.from_arrays(info, arrays)


InfoT = TypeVar("InfoT", bound=StatsInfo)


def load_sums(
    folder: Path, stem: str, info_type: type[InfoT], version: int, remedy: str
) -> tuple[InfoT, dict[str, npt.NDArray[np.generic]]]:
    """(settings, arrays) of `stem`.json and `stem`.safetensors in `folder`.

    Raises:
        StatsError: missing (`remedy` says how to make them), damaged, or of another version.
    """
    path = folder / f"{stem}.json"
    missing = f"{folder} holds no finished statistics (no {path.name}): {remedy}"
    raw = read_json(path, StatsError, missing=missing, damaged="calibrate again")
    if isinstance(raw, dict) and raw.get("version") != version:
        raise StatsError(
            f"{path} has version {raw.get('version')}, this edge-moe reads "
            f"{version}: calibrate again"
        )
    try:
        return info_type.model_validate(raw), load_file(folder / f"{stem}.safetensors")
    except (OSError, ValueError, ValidationError, SafetensorError) as error:
        raise StatsError(f"{folder} is damaged ({_first_line(error)}): calibrate again") from None


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
    if not folder.exists():
        require_new_output(output)


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
