"""split.json and the model card of a split model."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from edge_moe.converters.upcycle.record import card_head
from edge_moe.converters.upcycle.split_student import DistilSettings
from edge_moe.converters.window_training import JudgedTraining
from edge_moe.measurement import Provenance
from edge_moe.plan import MemoryTerm
from edge_moe.units import MAX_SEED

RECORD_NAME = "split.json"


class SplitSettings(BaseModel):
    """How a dense FFN is split."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    ridge: float = Field(default=0.01, ge=0)
    """Of the router, as a share of the inputs' mean square."""
    max_tilt: float = Field(default=1e-3, gt=0, lt=1)
    """How far any expert's weight may stray from that of equal scores, as a share of it."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)


class LayerRecord(BaseModel):
    """What came of one layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recall: float
    """Share of the top_k experts of most energy that the router finds, on the calibration text."""
    tilt_bound: float
    """See `split_router.tilt_bound`."""


class SplitRecord(JudgedTraining):
    """split.json: what was done."""

    provenance: Provenance
    source: str
    source_fingerprint: str
    architecture: str
    num_experts: int
    top_k: int
    expert_width: int
    shared_width: int
    settings: SplitSettings
    data: list[str]
    num_tokens: int
    """Of calibration text."""
    layers: list[LayerRecord]
    distillation: DistilSettings
    """Of the distillation, on windows that only judged; step 0 is the split as it is."""
    kept_step: int
    memory_terms: list[MemoryTerm]
    total_bytes: int
    """All weight files."""

    @property
    def recall(self) -> float:
        """Mean over the layers."""
        return sum(layer.recall for layer in self.layers) / len(self.layers)


def split_card(record: SplitRecord, location: Path, name: str) -> str:
    """README.md of the folder `name`; `location` is the dense model."""
    head, base = card_head(record.source, location, name)
    return f"""{head}
{record.architecture} split from the dense model {base} with edge-moe \
{record.provenance.edge_moe_version}.
Of the neurons of a feed-forward layer {record.shared_width} are always on, \
{record.num_experts} experts have {record.expert_width} each, of which {record.top_k} are chosen \
per token.
Split by {record.num_tokens} tokens of {", ".join(record.data)}. Routers find {record.recall:.0%} \
of the experts that matter most on that text.
{_learned(record)}

`{RECORD_NAME}` has the settings and every layer.
"""


def _learned(record: SplitRecord) -> str:
    """What the model is beside the dense one."""
    first, kept = record.row(0), record.row(record.kept_step)
    if first is None or kept is None:
        tilt = max(layer.tilt_bound for layer in record.layers)
        return (
            f"With num_experts_per_tok = {record.num_experts} it computes what the dense model "
            f"does, but for weights of experts that stray by at most {tilt:.2g} of themselves."
        )
    return (
        f"Distilled from the dense model for {record.distillation.steps} steps: divergence on "
        f"windows held out from training {first.heldout_divergence:.4f} -> "
        f"{kept.heldout_divergence:.4f} nats per token."
    )
