"""The transformers model around paged experts: dense part loaded, experts never allocated.

Peak while loading: the dense part in its compute dtype plus one 16 MiB piece of a file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from edge_moe.checkpoint import TensorInfo
from edge_moe.errors import CheckpointError, PackageError, SpecError
from edge_moe.package import RESIDENT_NAME, Package
from edge_moe.spec import ModelSpec

EXPERTS_IMPLEMENTATION = "edge_moe_paged"
_PIECE_BYTES = 16 * 2**20
_TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_COUNT_ATTRIBUTES = ("num_experts", "num_local_experts", "n_routed_experts")


def verify_resident(package: Package) -> None:
    """Compare resident.safetensors with the checksum that was written beside it.

    Raises:
        PackageError: the file was changed after it was built.
    """
    path = package.folder / RESIDENT_NAME
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(_PIECE_BYTES):
            digest.update(piece)
    if digest.hexdigest() != package.manifest.resident_sha256:
        raise PackageError(f"{path} is damaged (its checksum differs): build the package again")


def compute_dtype(spec: ModelSpec, device: torch.device) -> torch.dtype:
    """float32 on a CPU, where 16-bit products are slow; the checkpoint's dtype on a GPU."""
    if device.type == "cpu":
        return torch.float32
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(spec.dtype, torch.float32)


def build_model(
    spec: ModelSpec,
    folder: Path,
    tensors: Iterable[TensorInfo],
    rows_per_layer: list[int],
    device: torch.device,
) -> Any:
    """The model of `folder`'s config.json with dense weights on `device` and experts on meta.

    `rows_per_layer` is the number of router rows of each MoE layer.

    Raises:
        SpecError: transformers cannot build the architecture.
        CheckpointError: a dense tensor is missing, misshapen or damaged.
    """
    model = _on_meta(folder, compute_dtype(spec, device))
    for index, layer_id in enumerate(spec.moe_layer_ids):
        shrink_router(model.get_submodule(spec.moe_module(layer_id)), rows_per_layer[index])
    _load_dense(model, spec, tensors, device)
    _rebuild_rotary(model, device)
    _require_complete(model, folder)
    return model.eval()


def moe_blocks(model: Any, spec: ModelSpec) -> list[Any]:
    """The MoE modules, in layer order."""
    return [model.get_submodule(spec.moe_module(layer_id)) for layer_id in spec.moe_layer_ids]


def held_bytes(model: Any) -> int:
    """Bytes of every parameter and buffer that is really in memory; shared ones count once."""
    named = [*model.parameters(), *model.buffers()]
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in named
        if not value.is_meta
    }
    return sum(storages.values())


def _on_meta(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, experts_implementation=EXPERTS_IMPLEMENTATION
            )
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SpecError(f"{folder / 'config.json'}: transformers refuses it: {reason}") from None


def shrink_router(block: Any, num_rows: int) -> None:
    """Tell block, router and experts how many experts this layer has."""
    for module in (block, block.gate, block.experts):
        for name in _COUNT_ATTRIBUTES:
            if hasattr(module, name):
                setattr(module, name, num_rows)


def _load_dense(
    model: Any, spec: ModelSpec, tensors: Iterable[TensorInfo], device: torch.device
) -> None:
    dtype = compute_dtype(spec, device)
    buffers = {name.rpartition(".")[2] for name in spec.family.optional_router_tensors}
    for info in tensors:
        name = spec.module_name(info.name)
        if name == "lm_head.weight" and spec.tie_word_embeddings:
            continue
        is_buffer = name.rpartition(".")[2] in buffers  # transformers keeps them in float32
        _assign(model, name, read_tensor(info, torch.float32 if is_buffer else dtype, device))
    if spec.tie_word_embeddings:
        model.lm_head.weight = model.get_input_embeddings().weight


def _assign(model: Any, name: str, value: torch.Tensor) -> None:
    """Replace a meta parameter or buffer by `value`; routers may have fewer rows than config."""
    module_name, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(module_name)
        known = getattr(module, attribute)
    except AttributeError:
        raise CheckpointError(f"tensor {name!r} has no place in the model") from None
    if known.shape[1:] != value.shape[1:] or known.ndim != value.ndim:
        raise CheckpointError(
            f"tensor {name!r} has shape {list(value.shape)}, config.json implies "
            f"{list(known.shape)}"
        )
    if attribute in module._parameters:
        module._parameters[attribute] = torch.nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[attribute] = value


def read_tensor(info: TensorInfo, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One stored tensor as `dtype`, read piece by piece.

    Raises:
        CheckpointError: truncated, NaN or infinity, or not a plain float dtype.
    """
    stored = _TORCH_DTYPES.get(info.dtype)
    if stored is None:
        raise CheckpointError(f"{info.path}: {info.name!r} is {info.dtype}, expected BF16/F16/F32")
    result = torch.empty(info.shape, dtype=dtype, device=device)
    flat = result.view(-1)
    descriptor = os.open(info.path, os.O_RDONLY)
    try:
        for start in range(0, info.num_bytes, _PIECE_BYTES):
            num_bytes = min(_PIECE_BYTES, info.num_bytes - start)
            piece = bytearray(os.pread(descriptor, num_bytes, info.offset + start))
            if len(piece) < num_bytes:
                raise CheckpointError(f"{info.path} is truncated inside {info.name!r}")
            values = torch.frombuffer(piece, dtype=stored)
            if not torch.isfinite(values).all():
                raise CheckpointError(
                    f"{info.path}: {info.name!r} holds NaN or infinity: download the file again"
                )
            first = start // stored.itemsize
            flat[first : first + len(values)] = values.to(device)
        os.posix_fadvise(descriptor, info.offset, info.num_bytes, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return result


def _rebuild_rotary(model: Any, device: torch.device) -> None:
    """Rotary tables are computed, not stored: make them anew, off the meta device."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None) and (
            "rotary" in type(module).__name__.lower()
        ):
            parent = model.get_submodule(name.rpartition(".")[0])
            fresh = type(module)(config=module.config).to(device)
            setattr(parent, name.rpartition(".")[2], fresh)


def _require_complete(model: Any, folder: Path) -> None:
    """Nothing but routed experts may be left without weights."""
    named = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, value in named if value.is_meta and ".experts." not in name]
    if left:
        raise CheckpointError(f"{folder}: {len(left)} dense tensors are missing, first {left[0]!r}")
