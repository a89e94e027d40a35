"""The header of a delta file: what the delta belongs to, and how it was made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from edge_moe.delta_layout import REMEDY
from edge_moe.errors import DeltaError
from edge_moe.json_files import parse_info

DELTA_VERSION = 2
INFO_KEY = "edge_moe_delta"
"""Of the file's metadata."""
_MOST_ENTRIES = 2**48

ScaleRule = Literal["l1", "least-squares", "alpha"]
"""How a tensor's scale was chosen. `l1`: signs and scale have the L1 norm of tau; `least-squares`:
the mean magnitude of what is kept, nearest to tau; `alpha` times the standard deviation of tau."""
Size = Annotated[int, Field(gt=0, lt=2**40)]
LayerId = Annotated[int, Field(ge=0, lt=2**16)]


def _require_few(shape: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(shape) >= _MOST_ENTRIES:
        raise ValueError("a tensor of 2^48 entries or more")
    return shape


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DenseTensor(_Model):
    """A tensor that is no routed expert's."""

    name: str
    """As the checkpoint calls it."""
    shape: Annotated[tuple[Size, ...], Field(max_length=8), AfterValidator(_require_few)]


class DeltaInfo(_Model):
    """What a delta belongs to, and how it was made."""

    version: int = DELTA_VERSION
    edge_moe_version: str
    base: str
    """Name of the folder that it was made against."""
    base_fingerprint: str
    tuned: str
    tuned_fingerprint: str
    density: float = Field(gt=0, le=1)
    """Share of a tensor's entries that is kept at most; those that did not change are not."""
    scale_rule: ScaleRule
    alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Of the rule `alpha`."""
    dense: tuple[DenseTensor, ...]
    moe_layer_ids: tuple[LayerId, ...]
    num_experts: Size
    expert_shapes: tuple[tuple[Size, Size], ...] = Field(min_length=2, max_length=3)
    """[rows, columns] of gate_proj where there is one, up_proj and down_proj."""

    @property
    def num_tensors(self) -> int:
        experts = len(self.moe_layer_ids) * self.num_experts
        return len(self.dense) + experts * len(self.expert_shapes)


def read_info(path: Path, metadata: Mapping[str, str]) -> DeltaInfo:
    """The header in the metadata of file `path`.

    Raises:
        DeltaError: no delta, of another version, or damaged.
    """
    if INFO_KEY not in metadata:
        raise DeltaError(f"{path} is no task delta: make one with `edge-moe delta`")
    info = parse_info(
        *(path, metadata[INFO_KEY], DeltaInfo, (DELTA_VERSION,)),
        kind="delta",
        again=REMEDY,
        error=DeltaError,
    )
    _check_names(path, info)
    return info


def _check_names(path: Path, info: DeltaInfo) -> None:
    """Names are keys, so none may come twice."""
    names: Sequence[object] = [each.name for each in info.dense]
    for values in (names, info.moe_layer_ids):
        if len(set(values)) != len(values):
            raise DeltaError(f"delta {path} names a tensor or a layer twice: {REMEDY}")
