"""Write a smaller Hugging Face checkpoint: dropped experts gone, the others renumbered from 0.

Every output tensor is a list of source byte ranges, so nothing is held in memory but one chunk (or
one matrix where an expert changes its dtype). One shard is complete or absent; a killed build
resumes at the next one.
"""

from __future__ import annotations

from collections.abc import Iterator

from edge_moe.checkpoint import Checkpoint
from edge_moe.config_reader import CONFIG_NAME
from edge_moe.converters.model_card import model_card, size_rows
from edge_moe.converters.progress import byte_progress
from edge_moe.converters.safetensors_writer import (
    file_bytes,
    shard_names,
    split_into_shards,
    write_index,
)
from edge_moe.converters.shards import SHARD_BYTES, write_shard
from edge_moe.converters.sidecar import (
    CARD_NAME,
    add_older_rope_keys,
    copy_sidecar,
    patch_expert_count,
    sidecar_bytes,
)
from edge_moe.converters.slicing import (
    DTYPE_OF_FORM,
    SlicedTensor,
    check_groups,
    data_bytes,
    dense_tensors,
    slice_experts,
    whole_tensor,
)
from edge_moe.converters.staging import BuildFolder
from edge_moe.errors import TargetError
from edge_moe.files import require_free_disk, write_text
from edge_moe.formats import DROP
from edge_moe.package import PLAN_NAME
from edge_moe.packed_tensors import PackedInfo
from edge_moe.plan import Plan
from edge_moe.spec import ModelSpec
from edge_moe.tensor_info import TensorInfo

_SMALL_FILES_BYTES = 2**20  # index, plan, model card


def export_hf(
    plan: Plan,
    checkpoint: Checkpoint,
    work: BuildFolder,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the checkpoint into `work`, continuing where a killed build stopped.

    Raises:
        TargetError: the plan needs what a Hugging Face checkpoint cannot express.
        DiskSpaceError: too little space, before anything is written.
        CheckpointError: weights that are damaged, NaN or infinite.
    """
    name = work.output.name
    check_hf(plan, checkpoint.spec)
    dense = [part for tensor in dense_tensors(plan, checkpoint) for part in _as_stored(tensor)]
    experts = list(_kept_experts(plan, checkpoint))
    others = [whole_tensor(info) for info in checkpoint.other_tensors]
    tensors = {tensor.entry.name: tensor for tensor in dense + experts + others}
    shards = split_into_shards([tensor.entry for tensor in tensors.values()], shard_bytes)
    total_bytes = sum(file_bytes(shard) for shard in shards)
    needed_bytes = total_bytes + sidecar_bytes(checkpoint.folder) + _SMALL_FILES_BYTES
    require_free_disk(work.output.parent, needed_bytes - work.written_bytes(), f"output {name}")
    copy_sidecar(checkpoint.folder, work.path)
    _write_config(plan, checkpoint, work)
    with byte_progress(f"build {name}", total_bytes) as advance:
        for shard_name, shard in zip(shard_names(len(shards)), shards, strict=True):
            write_shard(shard_name, [tensors[entry.name] for entry in shard], work, advance)
    write_index(work.path, shards)
    sizes = size_rows(checkpoint, data_bytes(dense + others), data_bytes(experts))
    write_text(work.path / CARD_NAME, model_card(plan, checkpoint, name, "hf", sizes))
    plan.save(work.path / PLAN_NAME)


def check_hf(plan: Plan, spec: ModelSpec) -> None:
    """Refuse plans that one `num_experts` and plain dtypes cannot express.

    Raises:
        TargetError: says which layer or form, and what to do.
    """
    counts = {len(plan.kept(row)) for row in plan.forms}
    if len(counts) != 1:
        raise TargetError(
            f"target hf needs one number of experts for all layers, the plan keeps {min(counts)} "
            f"to {max(counts)}: plan again with --target hf, or build with --target native"
        )
    forms = {form for row in plan.forms for form in row if form != DROP}
    if len(forms) != 1 or not forms <= set(DTYPE_OF_FORM):
        raise TargetError(
            f"target hf stores experts unpacked in one dtype, the plan uses "
            f"{', '.join(sorted(forms))}: plan again with --target hf, or build with "
            "--target native"
        )
    for layer_id, row in zip(plan.moe_layer_ids, plan.forms, strict=True):
        check_groups(layer_id, plan.kept(row), spec, "hf")


def _kept_experts(plan: Plan, checkpoint: Checkpoint) -> Iterator[SlicedTensor]:
    """The experts layer by layer, under their new names."""
    form = next(form for form in plan.forms[0] if form != DROP)
    for layer_id, row in zip(plan.moe_layer_ids, plan.forms, strict=True):
        yield from _layer_experts(layer_id, plan.kept(row), form, checkpoint)


def _layer_experts(
    layer_id: int, kept: list[int], form: str, checkpoint: Checkpoint
) -> Iterator[SlicedTensor]:
    spec, tensors = checkpoint.spec, checkpoint.tensors
    if checkpoint.is_fused:
        for name in spec.fused_tensor_names(layer_id):
            convert = _conversion(tensors[name], form)
            for info in stored_parts(tensors[name]):
                yield slice_experts(info, kept, spec.num_experts, convert)
        return
    for new_id, expert_id in enumerate(kept):
        old_names = spec.expert_tensor_names(layer_id, expert_id)
        new_names = spec.expert_tensor_names(layer_id, new_id)
        for old_name, new_name in zip(old_names, new_names, strict=True):
            convert = _conversion(tensors[old_name], form)
            for info in stored_parts(tensors[old_name]):
                renamed = new_name + info.name.removeprefix(old_name)
                yield whole_tensor(info, renamed, convert)


def _as_stored(tensor: SlicedTensor) -> list[SlicedTensor]:
    """A dense tensor; the ones it is packed in where it is."""
    packed = tensor.pieces[0] if len(tensor.pieces) == 1 else None
    if not isinstance(packed, PackedInfo):
        return [tensor]
    return [whole_tensor(info) for info in packed.packing.stored]


def stored_parts(info: TensorInfo) -> tuple[TensorInfo, ...]:
    """`info`, or the tensors that it is packed in: those go out as they are."""
    return info.packing.stored if isinstance(info, PackedInfo) else (info,)


def _conversion(info: TensorInfo, form: str) -> str | None:
    """`form` when it is another dtype than a plain tensor's; packed ones stay as they are."""
    if isinstance(info, PackedInfo) or DTYPE_OF_FORM[form] == info.dtype:
        return None
    return form


def _write_config(plan: Plan, checkpoint: Checkpoint, work: BuildFolder) -> None:
    text = (checkpoint.folder / CONFIG_NAME).read_bytes().decode("utf-8")
    patched = patch_expert_count(text, checkpoint.spec, len(plan.kept(plan.forms[0])))
    patched = add_older_rope_keys(patched, checkpoint.spec)
    (work.path / CONFIG_NAME).write_bytes(patched.encode("utf-8"))
