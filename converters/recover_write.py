"""The recovered package: everything of the one it came from, its routers and branches renewed.

Expert files are hard-linked where the file system can, copied elsewhere. They are never written in
place, by nobody, so that both packages stay whole when one of them is removed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from edge_moe.adapter import ADAPTER_CONFIG_NAME, adapter_config, tensor_names
from edge_moe.converters.recover_student import Branch
from edge_moe.converters.safetensors_writer import TensorEntry, file_bytes, safetensors_file
from edge_moe.converters.sidecar import CARD_NAME, sidecar_files
from edge_moe.converters.source_bytes import read_chunks
from edge_moe.files import atomic_path, require_free_disk, write_text
from edge_moe.package import (
    ADAPTER_NAME,
    MANIFEST_NAME,
    RESIDENT_NAME,
    AdapterRecord,
    Package,
    PackageManifest,
)
from edge_moe.runtime.allotment import dense_tensors
from edge_moe.tensor_info import TensorInfo

RECOVERY_NAME = "recovery.json"
_SMALL_FILES_BYTES = 2**22


def write_recovered(
    package: Package,
    folder: Path,
    rows: Mapping[int, Tensor],
    branches: Mapping[str, Branch],
    report: str,
    card: str,
) -> None:
    """Write the package into `folder`; the manifest last.

    `rows` are new router rows [R, H] by layer id, `branches` the trained ones by module, `report`
    the text of recovery.json, `card` what the model card gets to say.

    Raises:
        DiskSpaceError: too little space, before anything is written.
        CheckpointError: damaged dense weights.
    """
    _require_disk(package, folder, branches)
    _link_unchanged(package, folder)
    manifest = package.manifest
    if rows:
        manifest = _write_resident(package, folder, rows)
    else:
        _link(package.folder / RESIDENT_NAME, folder / RESIDENT_NAME)
    if branches:
        manifest = manifest.model_copy(
            update={"adapter": _write_adapter(package, folder, branches)}
        )
    old_card = package.folder / CARD_NAME
    before = old_card.read_text(encoding="utf-8") if old_card.exists() else ""
    write_text(folder / CARD_NAME, f"{before.rstrip()}\n\n{card}".lstrip())
    write_text(folder / RECOVERY_NAME, report)
    write_text(folder / MANIFEST_NAME, manifest.model_dump_json(indent=1) + "\n")


def expert_files(package: Package) -> list[str]:
    """Names of the files that hold expert records."""
    layers = package.manifest.layers
    return sorted({record.file for layer in layers for record in layer.experts})


def _require_disk(package: Package, folder: Path, branches: Mapping[str, Branch]) -> None:
    needed_bytes = (package.folder / RESIDENT_NAME).stat().st_size * 2 + _SMALL_FILES_BYTES
    needed_bytes += sum(
        4 * (branch.lora_a.numel() + branch.lora_b.numel()) for branch in branches.values()
    )
    if folder.stat().st_dev != package.folder.stat().st_dev:
        needed_bytes += sum(
            (package.folder / name).stat().st_size for name in expert_files(package)
        )
    require_free_disk(folder, needed_bytes, "the recovered package")


def _link_unchanged(package: Package, folder: Path) -> None:
    rewritten = {MANIFEST_NAME, CARD_NAME, RECOVERY_NAME, ADAPTER_CONFIG_NAME}
    for name in sidecar_files(package.folder):
        if str(name) not in rewritten:
            _link(package.folder / name, folder / name)
    for file in expert_files(package):
        _link(package.folder / file, folder / file)


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy of it."""
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)


def _write_resident(package: Package, folder: Path, rows: Mapping[int, Tensor]) -> PackageManifest:
    """Dense tensors with the new router rows, those in float32; the manifest that fits them."""
    spec = package.spec
    changed = {spec.router_tensor_names(layer)[0]: rows[layer] for layer in rows}
    infos = dense_tensors(package)
    entries = {
        info.name: TensorEntry(info.name, "F32" if info.name in changed else info.dtype, info.shape)
        for info in infos
    }
    infos.sort(key=lambda info: -entries[info.name].itemsize_bytes)  # each starts at its multiple
    ordered = [entries[info.name] for info in infos]
    path = folder / RESIDENT_NAME
    with safetensors_file(path, ordered, with_sha256=True) as writer:
        for info in infos:
            writer.write(info.name, _chunks(info, changed.get(info.name)))
    return package.manifest.model_copy(
        update={"resident_bytes": file_bytes(ordered), "resident_sha256": writer.sha256}
    )


def _chunks(info: TensorInfo, replacement: Tensor | None) -> Iterable[bytes]:
    return read_chunks(info) if replacement is None else [replacement.numpy().tobytes()]


def _write_adapter(package: Package, folder: Path, branches: Mapping[str, Branch]) -> AdapterRecord:
    tensors: dict[str, Tensor] = {}
    for module, branch in branches.items():
        name_a, name_b = tensor_names(module)
        tensors[name_a], tensors[name_b] = branch.lora_a.detach(), branch.lora_b.detach()
    entries = [TensorEntry(name, "F32", tuple(value.shape)) for name, value in tensors.items()]
    with safetensors_file(folder / ADAPTER_NAME, entries, with_sha256=True) as writer:
        for name, value in tensors.items():
            writer.write(name, [value.numpy().tobytes()])
    first = next(iter(branches.values()))
    rank = first.lora_a.shape[0]
    record = AdapterRecord(
        rank=rank,
        alpha=first.scale * rank,
        num_bytes=file_bytes(entries),
        sha256=writer.sha256,
    )
    config = adapter_config(record, list(branches), package.plan.model)
    write_text(folder / ADAPTER_CONFIG_NAME, config)
    return record
