"""The native artefact on disk: a folder that holds a shrunken model, checked before it is used.

    config.json, tokenizer files, ...   byte for byte those of the source checkpoint
    README.md                           a model card
    plan.json                           the plan it was built from
    edge_moe.json                       PackageManifest; written last, marks the folder complete
    resident.safetensors                dense tensors in their source dtype, router rows sliced
    experts-00001.safetensors, ...      expert records: U8 tensors `layers.{layer}.experts.{expert}`
    adapter.safetensors                 low-rank branches (see `edge_moe.adapter`), where recovered

One record is one expert: gate_proj [I, H], up_proj [I, H], down_proj [H, I] packed in its form, one
after the other, then zeros up to a multiple of 4096. Shadows, where a package has them, are records
of the same kind behind the bodies of their layer, `layers.{layer}.shadows.{expert}`. Every record
starts at a multiple of 4096 in its file (the safetensors header is padded with spaces), so it can
be read with O_DIRECT.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from edge_moe.errors import FormError, InputError, PackageError
from edge_moe.formats import FORM_NAMES, expert_bytes
from edge_moe.json_files import checked, read_json
from edge_moe.plan import Plan
from edge_moe.shadow import check_shadow, needs_shadow
from edge_moe.spec import ModelSpec

PACKAGE_VERSION = 1
MANIFEST_NAME = "edge_moe.json"
PLAN_NAME = "plan.json"
RESIDENT_NAME = "resident.safetensors"
ADAPTER_NAME = "adapter.safetensors"
RECORD_ALIGNMENT_BYTES = 4096


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ExpertRecord(_Model):
    """Where one expert's packed bytes lie."""

    expert_id: int = Field(ge=0)
    """Id in the source checkpoint."""
    form: str
    file: str
    offset: int = Field(ge=0, multiple_of=RECORD_ALIGNMENT_BYTES)
    num_bytes: int = Field(gt=0)
    """Without the padding."""
    crc32: int = Field(ge=0, lt=2**32)
    """zlib.crc32 of those bytes."""


class LayerRecords(_Model):
    """Kept experts of one layer, ascending by id: row r of the sliced router is `experts[r]`."""

    layer_id: int = Field(ge=0)
    experts: list[ExpertRecord]
    shadows: list[ExpertRecord] = []
    """Of every expert whose body is larger than its shadow, ascending by id; see `edge_moe.shadow`.
    Empty where a package has none."""


class AdapterRecord(_Model):
    """Low-rank branches that are merged into the dense weights when the package is opened."""

    rank: int = Field(gt=0)
    alpha: float = Field(gt=0, allow_inf_nan=False)
    """The branches are scaled by alpha / rank."""
    num_bytes: int = Field(gt=0)
    """Size of adapter.safetensors."""
    sha256: str


class PackageManifest(_Model):
    """`edge_moe.json`."""

    version: int = PACKAGE_VERSION
    edge_moe_version: str
    model_fingerprint: str
    layers: list[LayerRecords]
    resident_bytes: int
    """Size of resident.safetensors."""
    resident_sha256: str
    adapter: AdapterRecord | None = None
    shadow: str = ""
    """The form of all shadows; empty where there are none."""


class Package:
    """An opened native package. Reads manifests and file sizes only."""

    def __init__(self, folder: Path) -> None:
        """Open and check `folder`.

        Raises:
            PackageError: not a finished package, or damaged.
        """
        self.folder = folder
        self.manifest = _read_manifest(folder)
        self.spec = ModelSpec.from_file(folder / "config.json")
        self._check()

    @cached_property
    def own_fingerprint(self) -> str:
        """sha256 of edge_moe.json, which has the digests of all weights and their forms.

        Another build of the same checkpoint has another one.
        """
        return hashlib.sha256((self.folder / MANIFEST_NAME).read_bytes()).hexdigest()

    @cached_property
    def plan(self) -> Plan:
        return Plan.load(self.folder / PLAN_NAME)

    def _check(self) -> None:
        sizes: dict[str, int] = {}
        self._check_shadow_form()
        layer_ids = tuple(layer.layer_id for layer in self.manifest.layers)
        if layer_ids != self.spec.moe_layer_ids:
            raise PackageError(
                f"{self.folder / MANIFEST_NAME} lists layers {list(layer_ids)}, "
                f"config.json implies {list(self.spec.moe_layer_ids)}: build the package again"
            )
        for layer in self.manifest.layers:
            if len(layer.experts) < self.spec.top_k:
                raise PackageError(
                    f"{self.folder}: layer {layer.layer_id} keeps {len(layer.experts)} experts, "
                    f"fewer than top_k={self.spec.top_k}: build the package again"
                )
            for record in layer.experts:
                self._check_record(layer.layer_id, record, sizes)
            self._check_shadows(layer, sizes)
        self._check_size(RESIDENT_NAME, self.manifest.resident_bytes, sizes)
        if self.manifest.adapter is not None:
            self._check_size(ADAPTER_NAME, self.manifest.adapter.num_bytes, sizes)

    def _check_record(self, layer_id: int, record: ExpertRecord, sizes: dict[str, int]) -> None:
        where = f"{self.folder / MANIFEST_NAME}: layer {layer_id} expert {record.expert_id}"
        if Path(record.file).name != record.file:
            raise PackageError(f"{where} points outside the package: {record.file!r}")
        if record.form not in FORM_NAMES:
            raise PackageError(f"{where} has the unknown form {record.form!r}")
        self._check_size(record.file, record.offset + record.num_bytes, sizes)

    def _check_shadow_form(self) -> None:
        if not self.manifest.shadow:
            return
        try:
            check_shadow(self.manifest.shadow, self.spec)
        except (InputError, FormError) as error:
            raise PackageError(
                f"{self.folder / MANIFEST_NAME}: {error}: build the package again"
            ) from None

    def _check_shadows(self, layer: LayerRecords, sizes: dict[str, int]) -> None:
        """Every expert that needs a shadow has one of the right size, and no other has."""
        where = f"{self.folder / MANIFEST_NAME}: layer {layer.layer_id}"
        shadow = self.manifest.shadow
        wanted = [
            record.expert_id
            for record in layer.experts
            if needs_shadow(record.form, shadow, self.spec)
        ]
        found = [record.expert_id for record in layer.shadows]
        if found != wanted:
            raise PackageError(
                f"{where} lists shadows of the experts {found}, but the form {shadow!r} needs them "
                f"for {wanted}: build the package again"
            )
        for record in layer.shadows:
            num_bytes = expert_bytes(shadow, *self.spec.expert_shape)
            if (record.form, record.num_bytes) != (shadow, num_bytes):
                raise PackageError(
                    f"{where}: the shadow of expert {record.expert_id} is {record.num_bytes} bytes "
                    f"of {record.form!r}, not {num_bytes} of {shadow!r}: build the package again"
                )
            self._check_record(layer.layer_id, record, sizes)

    def _check_size(self, name: str, needed_bytes: int, sizes: dict[str, int]) -> None:
        path = self.folder / name
        if name not in sizes:
            sizes[name] = path.stat().st_size if path.exists() else 0
        if sizes[name] < needed_bytes:
            what = f"truncated: {sizes[name]} bytes" if path.exists() else "missing"
            raise PackageError(
                f"{path} is {what}; at least {needed_bytes} bytes are needed: build the package "
                "again"
            )


def is_package(folder: Path) -> bool:
    """Whether `folder` is a finished native package."""
    return (folder / MANIFEST_NAME).is_file()


def _read_manifest(folder: Path) -> PackageManifest:
    path = folder / MANIFEST_NAME
    missing = (
        f"{folder} is not a finished edge-moe package (no {MANIFEST_NAME}): "
        "run or resume `edge-moe build`"
    )
    raw = read_json(path, PackageError, missing=missing, damaged="build again")
    versions, again = (PACKAGE_VERSION,), "build again"
    return checked(
        raw, PackageManifest, str(path), versions=versions, again=again, kind=PackageError
    )
