"""What recovery changed, as a LoRA file for llama.cpp: to be loaded beside the plan's GGUF export.

llama.cpp adds (alpha / rank) B (A x) to a matrix, with the rank of each pair but one alpha for all.
Branches go out as they are. New router rows are a difference D [R, H] from the original's, which is
a LoRA too: A = D R / alpha, B the identity of rank R. Tensor names: NAME.lora_a, NAME.lora_b.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from edge_moe.adapter import BranchTensors, read_branches
from edge_moe.candidates import check_target
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.gguf_families import GGUF_FAMILIES
from edge_moe.converters.gguf_writer import (
    GgufTensor,
    add_tensor_info,
    import_gguf,
    write_tensor,
)
from edge_moe.converters.source_bytes import read_float32
from edge_moe.errors import InputError, TargetError
from edge_moe.files import atomic_path, require_free_disk
from edge_moe.package import RESIDENT_NAME, Package
from edge_moe.safetensors_header import read_header
from edge_moe.spec import ModelSpec
from edge_moe.tensor_info import FloatArray

ADAPTER_GGUF_NAME = "adapter.gguf"
_HEADER_BYTES = 2**20


def require_lora_gguf(package: Path) -> None:
    """Refuse, before anything is trained, a package whose recovery could not be exported.

    Raises:
        TargetError: llama.cpp does not know the architecture.
        MissingExtraError: the `gguf` package is not installed.
        PackageError: `package` is damaged.
    """
    import_gguf()
    check_target(Package(package).spec, "gguf")


def export_lora_gguf(package: Path, original: Path, output: Path) -> Path:
    """Write the recovery of `package` (a folder) to the new file `output`, which is returned.

    `original` is the checkpoint it was built from; the GGUF file to load it with is `build --target
    gguf` of the same plan.

    Raises:
        TargetError: llama.cpp does not know the architecture.
        InputError: nothing was recovered, another original, or `output` exists.
        MissingExtraError: the `gguf` package is not installed.
        DiskSpaceError: too little space.
    """
    gguf = import_gguf()
    recovered, checkpoint = Package(package), Checkpoint(original)
    check_target(recovered.spec, "gguf")
    if output.exists():
        raise InputError(f"output {output} already exists: choose another path or remove it first")
    if recovered.manifest.model_fingerprint != checkpoint.fingerprint:
        raise InputError(f"{package} was not built from {original}: give the original it came from")
    record = recovered.manifest.adapter
    alpha = record.alpha if record else 1.0
    tensors = [*_branch_tensors(recovered), *_router_tensors(recovered, checkpoint, alpha)]
    if not tensors:
        raise InputError(f"{package} was not recovered: run `edge-moe recover` first")
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    require_free_disk(output.parent, num_bytes + _HEADER_BYTES, f"LoRA file {output.name}")
    with atomic_path(output) as temporary:
        writer = gguf.GGUFWriter(temporary, recovered.spec.family.gguf_arch)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for tensor in tensors:
            add_tensor_info(writer, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            write_tensor(writer, tensor)
        writer.close()
    return output


def _branch_tensors(package: Package) -> Iterator[GgufTensor]:
    for branch in read_branches(package):
        name = lora_name(package.spec, f"{branch.module}.weight")
        yield from _pair(name, *_factors(branch))


def _router_tensors(package: Package, original: Checkpoint, alpha: float) -> Iterator[GgufTensor]:
    """Pairs for the routers whose rows differ from the original's."""
    resident = read_header(package.folder / RESIDENT_NAME)[0]
    for layer in package.manifest.layers:
        name = package.spec.router_tensor_names(layer.layer_id)[0]
        kept = [record.expert_id for record in layer.experts]
        change = read_float32(resident[name]) - original.read(name)[kept]
        if change.any():
            num_rows = np.float32(len(kept))
            identity = np.eye(len(kept), dtype=np.float32)
            scaled = change * (num_rows / np.float32(alpha))
            yield from _pair(lora_name(package.spec, name), scaled, identity)


def _factors(branch: BranchTensors) -> tuple[FloatArray, FloatArray]:
    return read_float32(branch.lora_a), read_float32(branch.lora_b)


def _pair(name: str, lora_a: FloatArray, lora_b: FloatArray) -> Iterator[GgufTensor]:
    for suffix, values in (("lora_a", lora_a), ("lora_b", lora_b)):
        chunks = partial(_chunks, values)
        yield GgufTensor(f"{name}.{suffix}", values.shape, "f32", chunks)


def lora_name(spec: ModelSpec, name: str) -> str:
    """llama.cpp's name of the matrix that a pair is added to.

    Raises:
        TargetError: GGUF has no such matrix, or one whose rows lie otherwise.
    """
    rule = GGUF_FAMILIES[spec.model_type].rule(spec, name)
    if rule.transform is not None:
        raise TargetError(
            f"GGUF stores {name!r} rearranged, and this export does not rearrange what recovery "
            "changed in it: run the package with `edge-moe run` instead"
        )
    return rule.names[0]


def _chunks(values: FloatArray) -> Iterator[bytes]:
    yield np.ascontiguousarray(values).tobytes()
