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

from edge_moe.config_reader import CONFIG_NAME
from edge_moe.errors import CheckpointError, PackageError
from edge_moe.package import RESIDENT_NAME, Package
from edge_moe.packed_tensors import PackedInfo
from edge_moe.runtime.model_config import load_config, refused
from edge_moe.runtime.moe_block import MODULE_STACKS, MoeBlock
from edge_moe.spec import ModelSpec
from edge_moe.tensor_info import TensorInfo

EXPERTS_IMPLEMENTATION = "edge_moe_paged"
_PIECE_BYTES = 16 * 2**20
_TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_SELECTION_BIAS = ("e_score_correction_bias", "expert_bias")


def verify_resident(package: Package) -> None:
    """Compare resident.safetensors with the checksum that was written beside it.

    Raises:
        PackageError: the file was changed after it was built.
    """
    path = package.folder / RESIDENT_NAME
    if file_sha256(path) != package.manifest.resident_sha256:
        raise PackageError(f"{path} is damaged (its checksum differs): build the package again")


def file_sha256(path: Path) -> str:
    """Digest of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


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
    model = meta_model(folder, compute_dtype(spec, device), EXPERTS_IMPLEMENTATION)
    if (folder / "generation_config.json").exists():
        model.generation_config = _generation_config(folder)
    fill_buffers(model, device)
    for block, num_rows in zip(moe_blocks(model, spec), rows_per_layer, strict=True):
        block.set_num_experts(num_rows)
    _load_dense(model, spec, tensors, device)
    _require_complete(model, folder)
    return model.eval()


def moe_blocks(model: Any, spec: ModelSpec) -> list[MoeBlock]:
    """The MoE blocks, in layer order."""
    return [MoeBlock(model, spec, layer_id) for layer_id in spec.moe_layer_ids]


def held_bytes(model: Any) -> int:
    """Bytes of every parameter and buffer that is really in memory; shared ones count once."""
    named = [*model.parameters(), *model.buffers()]
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in named
        if not value.is_meta
    }
    return sum(storages.values())


def meta_model(folder: Path, dtype: torch.dtype, experts_implementation: str) -> Any:
    """The language model of `folder`'s config.json without weights.

    `experts_implementation` is a name registered in transformers' `ALL_EXPERTS_FUNCTIONS`.

    Raises:
        SpecError: transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, experts_implementation=experts_implementation
            )
    except (OSError, ValueError, KeyError) as error:
        raise refused(folder / CONFIG_NAME, error) from None


def _generation_config(folder: Path) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise refused(folder / "generation_config.json", error) from None


def _load_dense(
    model: Any, spec: ModelSpec, tensors: Iterable[TensorInfo], device: torch.device
) -> None:
    dtype = compute_dtype(spec, device)
    for info in tensors:
        name = spec.module_name(info.name)
        if spec.is_tied_head(name):
            continue
        is_bias = name.endswith(_SELECTION_BIAS)  # transformers keeps them in float32
        assign(model, name, read_tensor(info, torch.float32 if is_bias else dtype, device))
    if spec.tie_word_embeddings:
        model.lm_head.weight = model.get_input_embeddings().weight


def assign(model: Any, name: str, value: torch.Tensor) -> None:
    """Replace a meta parameter or buffer by `value`; routers may have fewer rows than config.

    Raises:
        CheckpointError: `model` has no place of that name or shape.
    """
    module_name, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(module_name)
        known = getattr(module, attribute)
    except AttributeError:
        raise CheckpointError(f"tensor {name!r} has no place in the model") from None
    if not _may_replace(known, value):
        raise CheckpointError(
            f"tensor {name!r} has shape {list(value.shape)}, config.json implies "
            f"{list(known.shape)}"
        )
    if attribute in module._parameters:
        module._parameters[attribute] = torch.nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[attribute] = value


def _may_replace(known: torch.Tensor, value: torch.Tensor) -> bool:
    """Equal shapes, but for the first axis or, after an axis of one row, the second."""
    if known.ndim != value.ndim:
        return False
    first = 1 if known.ndim == 2 and known.shape[0] == value.shape[0] == 1 else 0
    return known.shape[first + 1 :] == value.shape[first + 1 :]


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
    if isinstance(info, PackedInfo):
        first = 0
        for chunk in info.chunks():
            values = torch.frombuffer(bytearray(chunk), dtype=torch.bfloat16)
            flat[first : first + len(values)] = values.to(device)
            first += len(values)
        return result
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


def fill_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that no checkpoint stores, such as rotary tables, off the meta device.

    transformers computes them anew in `_init_weights`; weights that are still on the meta device
    stay there.
    """
    for module in model.modules():
        names = [
            name
            for name in module._non_persistent_buffers_set
            if module._buffers[name] is not None and module._buffers[name].is_meta
        ]
        if not names:
            continue
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        model._init_weights(module)


def _require_complete(model: Any, folder: Path) -> None:
    """Nothing but routed experts may be left without weights."""
    named = [*model.named_parameters(), *model.named_buffers()]
    left = [
        name
        for name, value in named
        if value.is_meta and not (".experts." in name and name.endswith(MODULE_STACKS))
    ]
    if left:
        raise CheckpointError(f"{folder}: {len(left)} dense tensors are missing, first {left[0]!r}")
