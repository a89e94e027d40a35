"""The `Plan`: the form and tier of every expert, the bytes by term, what was expected of it.

Plain JSON, diffable. The optimiser writes it, builders and runtimes read it, reports explain it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edge_moe.errors import PlanError
from edge_moe.files import write_text
from edge_moe.formats import DROP, is_form
from edge_moe.json_files import checked, read_json

PLAN_VERSION = 1
_MODEL_SUFFIXES = (".gguf", ".safetensors", ".onnx")
Target = Literal["native", "gguf", "hf", "onnx"]
Device = Literal["cpu", "cuda"]
Source = Literal["headers", "formula", "measured", "assumed", "plan"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MemoryTerm(_Model):
    """One term of the memory bill, and where the number comes from."""

    name: str
    num_bytes: int = Field(ge=0)
    source: Source
    note: str = ""


def formula_terms(num_bytes: Mapping[str, int]) -> list[MemoryTerm]:
    """Terms, by name, that were computed before anything runs."""
    return [
        MemoryTerm(name=name, num_bytes=count, source="formula")
        for name, count in num_bytes.items()
    ]


class FrontierPoint(_Model):
    """The best plan at one size."""

    total_bytes: int
    expert_bytes: int
    loss: float
    """Predicted loss, in the plan's own unit (see `Plan.loss_unit`)."""


class Rival(_Model):
    """Another way to spend the same expert bytes."""

    name: str
    """`prune only`, `quantise only`, `one type for all`, `random retention`."""
    expert_bytes: int
    loss: float
    forms: list[list[str]]
    """[L][E], as in the plan, so that a rival can be built and measured too."""
    note: str = ""


class SearchTrial(_Model):
    """One plan that the search measured."""

    name: str
    kld: float
    """Mean KL divergence from the whole model on the search's text, nats per token."""


class CalibrationOptions(_Model):
    """What `edge-moe calibrate` was told: enough to do it again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: tuple[str, ...]
    """Shipped names, and files with their whole path."""
    window_tokens: int
    max_windows: int | None
    forms: tuple[str, ...]
    shards: tuple[tuple[int, int], ...] = ((0, 1),)
    """(i, N) of every part that was joined; ((0, 1),) when they cover the whole text."""
    quantiser: str = "nearest"
    """How experts were packed when their forms were measured, and are packed by `build`."""


class SearchRecord(_Model):
    """How a plan was found among several: what was tried, and what it measured."""

    chosen: str
    is_complete: bool
    """False where the time ran out, or measuring failed, before every round was done."""
    seconds: float
    trials: list[SearchTrial]
    text: str = ""
    """The text that was measured on."""
    tasks: list[str] = []
    """Its tasks: shipped names, and files with their whole path."""
    limit_seconds: float | None = None
    """The time that was allowed."""
    failure: str = ""
    """Why no more plans could be measured; empty where only time, or nothing, ended the search."""

    @property
    def early_end(self) -> str:
        """What ended it before every round was done; empty where nothing did."""
        if self.failure:
            return f"no more could be measured: {self.failure}"
        return "" if self.is_complete else "the time ran out before every proposal was measured"


class Plan(_Model):
    """Everything that building, running and reporting need to know. L MoE layers, E experts."""

    version: int = PLAN_VERSION
    edge_moe_version: str
    model: str
    """The MODEL argument the plan was made from (a local path or a hub id)."""
    model_type: str
    model_fingerprint: str
    stats_fingerprint: str
    gradient_fingerprint: str = ""
    """Of the gradient statistics; empty where none were used."""
    tasks: list[str]
    target: Target
    device: Device
    budget_bytes: int = Field(gt=0)
    context_tokens: int = Field(gt=0)
    moe_layer_ids: list[int]
    top_k: int
    forms: list[list[str]]
    """[L][E] form of every expert; `drop` means pruned."""
    tiers: list[list[Literal["device", "ram", "disk", "none"]]]
    """[L][E] where a kept expert lives; `none` for dropped ones."""
    terms: list[MemoryTerm]
    """The bill: dense weights, experts, KV cache, workspace, runtime; adds up to `total_bytes`."""
    billed_target: Target | None = None
    """What the bill is for, where that is not `target`: a plan may be built as something else."""
    loss: float
    loss_unit: str
    frontier: list[FrontierPoint]
    rivals: list[Rival]
    saliency: list[list[float]]
    """[L][E] the loss of dropping this expert, as a share of its layer's sum."""
    routed_share: list[list[float]]
    """[L][E] share of the layer's routed calibration tokens."""
    super_experts: list[tuple[int, int]]
    """(layer_id, expert_id) protected from being dropped or stored below 4 bits."""
    form_bytes: dict[str, int] = {}
    """Bytes of one expert in every form that was considered, the 16-bit one included."""
    stored_forms: list[str] = []
    """[L] the form that each layer has in a source that is a GGUF; empty for a checkpoint."""
    limits: list[str]
    """What the target cannot express, in sentences."""
    warnings: list[str] = []
    search: SearchRecord | None = None
    """None for the plain program."""
    calibration: CalibrationOptions | None = None
    """None where the statistics do not say."""
    data_fingerprint: str = ""
    """Of the calibration text, which some quantisers need again."""
    shadow: str = ""
    """The form of the shadows that a native package holds beside the bodies; empty for none."""
    shadow_bytes: int = Field(default=0, ge=0)
    """What they take: on disk, and in memory where a package is paged with them (see
    `edge_moe.shadow`), in which case bodies get that much less. Not among `terms`: while all bodies
    are in memory, no shadow is."""

    @model_validator(mode="after")
    def _check(self) -> Plan:
        num_layers, num_experts = len(self.moe_layer_ids), len(self.forms[0]) if self.forms else 0
        for name in ("forms", "tiers", "saliency", "routed_share"):
            rows = getattr(self, name)
            if len(rows) != num_layers or {len(row) for row in rows} != {num_experts}:
                raise ValueError(f"{name} is not a {num_layers} x {num_experts} table")
        for layer_id, row in zip(self.moe_layer_ids, self.forms, strict=True):
            for form in row:
                if not is_form(form):
                    raise ValueError(f"layer {layer_id} names the unknown form {form!r}")
            if len(self.kept(row)) < self.top_k:
                raise ValueError(f"layer {layer_id} keeps fewer than top_k={self.top_k} experts")
        self._check_tiers()
        if "experts" not in {term.name for term in self.terms}:
            raise ValueError("terms hold no term 'experts'")
        return self

    def _check_tiers(self) -> None:
        for layer_id, forms, tiers in zip(self.moe_layer_ids, self.forms, self.tiers, strict=True):
            for expert_id, (form, tier) in enumerate(zip(forms, tiers, strict=True)):
                if (form == DROP) != (tier == "none"):
                    raise ValueError(
                        f"layer {layer_id} expert {expert_id} has form {form!r} and tier {tier!r}: "
                        "dropped experts, and no others, live nowhere"
                    )

    @staticmethod
    def kept(row: Sequence[str]) -> list[int]:
        """Ids of the experts that a layer's `forms` row keeps, ascending."""
        return [expert_id for expert_id, form in enumerate(row) if form != DROP]

    @property
    def bill_target(self) -> Target:
        """What `terms` are the bill of."""
        return self.billed_target or self.target

    @property
    def total_bytes(self) -> int:
        return sum(term.num_bytes for term in self.terms)

    @property
    def quantiser(self) -> str:
        """How `build` packs the experts."""
        return self.calibration.quantiser if self.calibration else "nearest"

    def term(self, name: str) -> MemoryTerm:
        """The term called `name`.

        Raises:
            KeyError: there is none.
        """
        for term in self.terms:
            if term.name == name:
                return term
        raise KeyError(name)

    def with_forms(self, forms: list[list[str]]) -> Plan:
        """This plan with other forms [L][E] that were considered; tiers and bytes follow them.

        The budget grows where they need more.
        """
        num_bytes = sum(self.form_bytes[form] for row in forms for form in row)
        terms = [
            term.model_copy(update={"num_bytes": num_bytes}) if term.name == "experts" else term
            for term in self.terms
        ]
        changes = {
            "forms": forms,
            "tiers": [["none" if form == DROP else "device" for form in row] for row in forms],
            "terms": [term.model_dump() for term in terms],
            "budget_bytes": max(self.budget_bytes, sum(term.num_bytes for term in terms)),
        }
        return Plan.model_validate(self.model_dump() | changes)

    def save(self, path: Path) -> None:
        """Write the plan as JSON, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: missing, not JSON, another version, or inconsistent.
        """
        if path.is_dir() or path.suffix in _MODEL_SUFFIXES:
            raise PlanError(
                f"{path} is no plan but a model: first `edge-moe calibrate {path} -o stats`, then "
                f"`edge-moe plan {path} --stats stats --budget SIZE -o plan.json`, and give "
                "plan.json"
            )
        missing = f"plan {path} does not exist: make one with `edge-moe plan`"
        raw = read_json(path, PlanError, missing=missing, damaged="make it again")
        again = "make it again with `edge-moe plan`"
        versions = (PLAN_VERSION,)
        return checked(raw, cls, f"plan {path}", versions=versions, again=again, kind=PlanError)
