"""`SkipCalibration`: what the ratio rules of expert skipping need, measured once on task text.

A JSON file of its own. w_0 is a token's largest router weight and w_i another of its chosen ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from edge_moe.errors import StatsError
from edge_moe.files import write_text
from edge_moe.json_files import checked, read_json

SKIP_CALIBRATION_VERSION = 1


class SkipCalibration(BaseModel):
    """Medians of w_i / w_0 per MoE layer, and where they come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = SKIP_CALIBRATION_VERSION
    edge_moe_version: str
    model_type: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    data_fingerprint: str
    tasks: tuple[str, ...]
    window_tokens: int
    num_windows: int
    num_tokens: int
    moe_layer_ids: tuple[int, ...]
    top_k: int
    median_ratios: tuple[Annotated[float, Field(ge=0, le=1)], ...]
    """[L] median over tokens and over i = 1 .. top_k - 1 of w_i / w_0."""

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> SkipCalibration:
        """Read what `save` wrote.

        Raises:
            StatsError: missing, damaged, or written by another version.
        """
        what, remedy = f"skip calibration {path}", "run `edge-moe calibrate-skipping` again"
        missing = f"{what} does not exist: run `edge-moe calibrate-skipping`"
        raw = read_json(path, StatsError, missing=missing, damaged=remedy)
        versions = (SKIP_CALIBRATION_VERSION,)
        calibration = checked(raw, cls, what, versions=versions, again=remedy, kind=StatsError)
        if len(calibration.median_ratios) != len(calibration.moe_layer_ids):
            raise StatsError(
                f"skip calibration {path} has {len(calibration.median_ratios)} ratios for "
                f"{len(calibration.moe_layer_ids)} layers: {remedy}"
            )
        return calibration

    def require_model(self, model_fingerprint: str) -> None:
        """Refuse a calibration of another model.

        Raises:
            StatsError: the fingerprints differ.
        """
        if self.model_fingerprint != model_fingerprint:
            raise StatsError(
                f"the skip calibration belongs to another model ({self.model_fingerprint[:12]}, "
                f"not {model_fingerprint[:12]}): run `edge-moe calibrate-skipping` on this one"
            )
