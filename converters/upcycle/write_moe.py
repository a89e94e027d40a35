"""The MoE folder: config.json, safetensors shards, tokenizer. Nothing but one tensor in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence

from edge_moe.config_reader import CONFIG_NAME
from edge_moe.converters.progress import byte_progress
from edge_moe.converters.safetensors_writer import (
    file_bytes,
    shard_names,
    split_into_shards,
    write_index,
)
from edge_moe.converters.shards import SHARD_BYTES, write_shard
from edge_moe.converters.staging import BuildFolder
from edge_moe.converters.upcycle.dense_model import EMBEDDING, HEAD, DenseModel
from edge_moe.converters.upcycle.stored_tensor import StoredTensor
from edge_moe.converters.upcycle.target import MoeLayer, MoeShape, Target
from edge_moe.files import require_free_disk, write_text

_SMALL_FILES_BYTES = 2**20  # config.json, index, model card, record


def moe_tensors(
    dense: DenseModel,
    target: Target,
    shape: MoeShape,
    layers: Sequence[MoeLayer],
    *,
    keep_tied: bool = False,
) -> list[StoredTensor]:
    """Every tensor of the MoE, in the order written.

    A tied model gets an output matrix of its own, since llama.cpp's qwen2moe does not load without
    one; with `keep_tied` it stays tied.
    """
    found = dense.outside_ffn()
    if dense.config.is_tied and not keep_tied:
        found.append(dense.tensors[EMBEDDING].named(HEAD))
    for layer_id, layer in enumerate(layers):
        found += target.tensors(layer_id, layer, dense, shape)
    return found


def folder_bytes(
    dense: DenseModel,
    target: Target,
    shape: MoeShape,
    layers: Sequence[MoeLayer],
    *,
    keep_tied: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Disk bytes of the folder that `write_moe` writes, known from shapes alone."""
    tensors = moe_tensors(dense, target, shape, layers, keep_tied=keep_tied)
    shards = split_into_shards([tensor.entry for tensor in tensors], shard_bytes)
    return sum(map(file_bytes, shards)) + dense.sidecar_bytes + _SMALL_FILES_BYTES


def write_moe(
    dense: DenseModel,
    target: Target,
    shape: MoeShape,
    layers: Sequence[MoeLayer],
    work: BuildFolder,
    *,
    keep_tied: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write the folder into `work`, going on at the shard where a killed run stopped.

    Returns the bytes of all weight files. The caller adds the model card and its record.

    Raises:
        DiskSpaceError: too little space, before anything is written.
        InputError: a shape that the architecture cannot state.
        CheckpointError: damaged weights, or values that their dtype cannot hold.
    """
    target.check(shape)
    tensors = moe_tensors(dense, target, shape, layers, keep_tied=keep_tied)
    by_name = {tensor.name: tensor for tensor in tensors}
    shards = split_into_shards([tensor.entry for tensor in tensors], shard_bytes)
    total_bytes = sum(map(file_bytes, shards))
    missing_bytes = total_bytes + dense.sidecar_bytes + _SMALL_FILES_BYTES - work.written_bytes()
    require_free_disk(work.output.parent, missing_bytes, f"output {work.output.name}")
    dense.copy_sidecar(work.path)
    config = target.config(dense, shape, is_tied=dense.config.is_tied and keep_tied)
    write_text(work.path / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
    with byte_progress(f"writing {work.output.name}", total_bytes) as advance:
        for shard_name, shard in zip(shard_names(len(shards)), shards, strict=True):
            write_shard(shard_name, [by_name[entry.name] for entry in shard], work, advance)
    write_index(work.path, shards)
    return total_bytes
