"""Write a native package, laid out as `edge_moe.package` says.

One experts file per MoE layer, so that a killed build resumes at the last complete layer. Peak
memory: `packing.packing_peak_bytes`, or one 8 MiB chunk where bytes are copied.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from edge_moe import __version__
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.model_card import SizeRow, model_card, size_rows
from edge_moe.converters.packer import Packer, PlainPacker
from edge_moe.converters.packing import expert_records
from edge_moe.converters.progress import Advance, byte_progress
from edge_moe.converters.safetensors_writer import TensorEntry, file_bytes, header, safetensors_file
from edge_moe.converters.sidecar import CARD_NAME, copy_sidecar, sidecar_bytes
from edge_moe.converters.slicing import SlicedTensor, check_groups, data_bytes, dense_tensors
from edge_moe.converters.staging import BuildFolder
from edge_moe.files import require_free_disk, write_text
from edge_moe.formats import DROP, expert_bytes
from edge_moe.package import (
    MANIFEST_NAME,
    PLAN_NAME,
    RECORD_ALIGNMENT_BYTES,
    RESIDENT_NAME,
    ExpertRecord,
    LayerRecords,
    PackageManifest,
)
from edge_moe.plan import Plan
from edge_moe.shadow import needs_shadow
from edge_moe.spec import ModelSpec

_SMALL_FILES_BYTES = 2**20  # manifest, model card


@dataclass(frozen=True)
class _PlannedRecord:
    """One expert that is about to be written."""

    expert_id: int
    form: str
    num_bytes: int
    """Without padding."""


@dataclass(frozen=True)
class _LayerFile:
    """What one experts file will hold."""

    layer_id: int
    name: str
    records: tuple[_PlannedRecord, ...]
    shadows: tuple[_PlannedRecord, ...]

    @cached_property
    def entries(self) -> list[TensorEntry]:
        """Of the bodies, then of their shadows."""
        return [
            TensorEntry(
                f"layers.{self.layer_id}.{kind}.{record.expert_id}",
                "U8",
                (_padded(record.num_bytes),),
            )
            for kind, records in (("experts", self.records), ("shadows", self.shadows))
            for record in records
        ]

    @property
    def file_bytes(self) -> int:
        return file_bytes(self.entries, RECORD_ALIGNMENT_BYTES)


def export_native(
    plan: Plan, checkpoint: Checkpoint, work: BuildFolder, packer: Packer | None = None
) -> None:
    """Write the package into `work`, continuing where a killed build stopped.

    Raises:
        TargetError: the groups of a router keep unequal numbers of experts.
        DiskSpaceError: too little space, before anything is written.
        FormError: a form does not fit the model's rows.
        CheckpointError: weights that are damaged, NaN or infinite.
    """
    name = work.output.name
    for layer_id, row in zip(plan.moe_layer_ids, plan.forms, strict=True):
        check_groups(layer_id, plan.kept(row), checkpoint.spec, "native")
    dense = _dense_tensors(plan, checkpoint)
    layers = _layer_files(plan, checkpoint.spec)
    resident_bytes = file_bytes([tensor.entry for tensor in dense])
    total_bytes = resident_bytes + sum(layer.file_bytes for layer in layers)
    needed_bytes = total_bytes + sidecar_bytes(checkpoint.folder) + _SMALL_FILES_BYTES
    require_free_disk(work.output.parent, needed_bytes - work.written_bytes(), f"package {name}")
    copy_sidecar(checkpoint.folder, work.path)
    with byte_progress(f"build {name}", total_bytes) as advance:
        resident_sha256 = _write_resident(dense, work, advance)
        packer = packer or PlainPacker(checkpoint)
        records = [_write_layer(layer, checkpoint, work, packer, advance) for layer in layers]
    manifest = PackageManifest(
        edge_moe_version=__version__,
        model_fingerprint=plan.model_fingerprint,
        layers=records,
        resident_bytes=resident_bytes,
        resident_sha256=resident_sha256,
        shadow=plan.shadow,
    )
    packed_bytes = sum(record.num_bytes for layer in layers for record in layer.records)
    sizes = size_rows(checkpoint, data_bytes(dense), packed_bytes)
    if plan.shadow_bytes:
        sizes.append(SizeRow(f"shadows ({plan.shadow})", 0, plan.shadow_bytes))
    write_text(work.path / CARD_NAME, model_card(plan, checkpoint, name, "native", sizes))
    plan.save(work.path / PLAN_NAME)
    write_text(work.path / MANIFEST_NAME, manifest.model_dump_json(indent=1) + "\n")


def _dense_tensors(plan: Plan, checkpoint: Checkpoint) -> list[SlicedTensor]:
    """Widest items first, so that each tensor starts at a multiple of its item."""
    tensors = dense_tensors(plan, checkpoint)
    return sorted(tensors, key=lambda tensor: -tensor.entry.itemsize_bytes)


def _layer_files(plan: Plan, spec: ModelSpec) -> list[_LayerFile]:
    bytes_of = {
        form: expert_bytes(form, *spec.expert_shape)
        for form in {*(form for row in plan.forms for form in row), plan.shadow or DROP}
    }

    def planned(expert_id: int, form: str) -> _PlannedRecord:
        return _PlannedRecord(expert_id, form, bytes_of[form])

    return [
        _LayerFile(
            layer_id,
            f"experts-{index:05d}.safetensors",
            tuple(planned(i, row[i]) for i in plan.kept(row)),
            tuple(
                planned(i, plan.shadow)
                for i in plan.kept(row)
                if needs_shadow(row[i], plan.shadow, spec)
            ),
        )
        for index, (layer_id, row) in enumerate(
            zip(plan.moe_layer_ids, plan.forms, strict=True), start=1
        )
    ]


def _write_resident(dense: list[SlicedTensor], work: BuildFolder, advance: Advance) -> str:
    """Returns the file's sha256."""
    digest = work.finished(RESIDENT_NAME)
    entries = [tensor.entry for tensor in dense]
    if digest is None:
        with safetensors_file(work.path / RESIDENT_NAME, entries, with_sha256=True) as writer:
            for tensor in dense:
                writer.write(tensor.entry.name, tensor.chunks())
        digest = writer.sha256
        work.add(RESIDENT_NAME, digest)
    advance(file_bytes(entries))
    return str(digest)


def _write_layer(
    layer: _LayerFile,
    checkpoint: Checkpoint,
    work: BuildFolder,
    packer: Packer,
    advance: Advance,
) -> LayerRecords:
    facts = work.finished(layer.name)
    if facts is not None:
        advance(layer.file_bytes)
        return LayerRecords.model_validate(facts)
    planned, records = [*layer.records, *layer.shadows], []
    offset = len(header(layer.entries, RECORD_ALIGNMENT_BYTES))
    with safetensors_file(work.path / layer.name, layer.entries, RECORD_ALIGNMENT_BYTES) as writer:
        experts = [(record.expert_id, record.form) for record in planned]
        packed = expert_records(checkpoint, layer.layer_id, experts, packer)
        for entry, record, chunks in zip(layer.entries, planned, packed, strict=True):
            summed = _Checksummed(chunks)
            writer.write(entry.name, summed.padded_to(entry.num_bytes))
            records.append(
                ExpertRecord(
                    expert_id=record.expert_id,
                    form=record.form,
                    file=layer.name,
                    offset=offset,
                    num_bytes=record.num_bytes,
                    crc32=summed.crc32,
                )
            )
            offset += entry.num_bytes
            advance(entry.num_bytes)
    num_bodies = len(layer.records)
    result = LayerRecords(
        layer_id=layer.layer_id, experts=records[:num_bodies], shadows=records[num_bodies:]
    )
    work.add(layer.name, result.model_dump())
    return result


class _Checksummed:
    """Passes chunks on, keeps their crc32."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = chunks
        self.crc32 = 0

    def padded_to(self, total_bytes: int) -> Iterable[bytes]:
        num_bytes = 0
        for chunk in self._chunks:
            self.crc32 = zlib.crc32(chunk, self.crc32)
            num_bytes += len(chunk)
            yield chunk
        yield bytes(max(0, total_bytes - num_bytes))


def _padded(num_bytes: int) -> int:
    return num_bytes + -num_bytes % RECORD_ALIGNMENT_BYTES
