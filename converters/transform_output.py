"""The files of a transformed checkpoint: one or more shards per MoE layer, and the dense shards.

A layer's shards are written when the layer is done, so they are also the progress of the run. All
names and sizes are known in advance, because every layer gets equally many, equally wide experts.
Memory: one expert in the stored dtype, or one chunk of a dense tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from edge_moe.checkpoint import Checkpoint
from edge_moe.config_reader import CONFIG_NAME
from edge_moe.converters.model_card import SizeRow, size_rows
from edge_moe.converters.safetensors_writer import (
    TensorEntry,
    file_bytes,
    safetensors_file,
    shard_names,
    split_into_shards,
    write_index,
)
from edge_moe.converters.shards import SHARD_BYTES, write_shard
from edge_moe.converters.sidecar import (
    add_older_rope_keys,
    copy_sidecar,
    patch_expert_count,
    patch_expert_width,
    sidecar_bytes,
)
from edge_moe.converters.slicing import FORM_OF_DTYPE, SlicedTensor, data_bytes, whole_tensor
from edge_moe.converters.staging import BuildFolder
from edge_moe.converters.transforms.base import LayerWeights
from edge_moe.errors import CheckpointError
from edge_moe.files import require_free_disk
from edge_moe.formats import get_form
from edge_moe.package import PLAN_NAME

_SMALL_FILES_BYTES = 2**20  # index, transform.json, model card


class TransformOutput:
    """Writes the transformed checkpoint into an unfinished build."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        work: BuildFolder,
        num_experts: int,
        expert_width: int,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self._checkpoint = checkpoint
        self._work = work
        self._num_experts = num_experts
        self._width = expert_width
        self._dense = _dense_tensors(checkpoint)
        layer_ids = checkpoint.spec.moe_layer_ids
        dense_shards = split_into_shards([tensor.entry for tensor in self._dense], shard_bytes)
        layer_shards = [
            split_into_shards(list(self._layer_entries(layer_id)), shard_bytes)
            for layer_id in layer_ids
        ]
        self._shards = [*dense_shards, *(shard for shards in layer_shards for shard in shards)]
        names = iter(shard_names(len(self._shards)))
        self._dense_names = [next(names) for _ in dense_shards]
        self._layer_names = {
            layer_id: [next(names) for _ in shards]
            for layer_id, shards in zip(layer_ids, layer_shards, strict=True)
        }
        self._layer_shards = dict(zip(layer_ids, layer_shards, strict=True))

    @property
    def total_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file_bytes(shard) for shard in self._shards)

    def require_disk(self, extra_bytes: int) -> None:
        """Refuse before anything is written when the disk lacks what is still to be written.

        Raises:
            DiskSpaceError: with the bytes needed and free.
        """
        needed = self.total_bytes + sidecar_bytes(self._checkpoint.folder) + _SMALL_FILES_BYTES
        name = f"output {self._work.output.name}"
        parent = self._work.output.parent
        require_free_disk(parent, needed + extra_bytes - self._work.written_bytes(), name)

    def layer_facts(self, layer_id: int) -> Any | None:
        """What `write_layer` recorded; None when the layer is not complete."""
        found = [self._work.finished(name) for name in self._layer_names[layer_id]]
        return found[-1] if all(facts is not None for facts in found) else None

    def write_layer(self, layer_id: int, weights: LayerWeights, facts: Any) -> None:
        """Write the shards of one layer and record them, with JSON `facts`."""
        tensors = dict(self._layer_tensors(layer_id, weights))
        names = self._layer_names[layer_id]
        for name, shard in zip(names, self._layer_shards[layer_id], strict=True):
            with safetensors_file(self._work.path / name, shard) as writer:
                for entry in shard:
                    writer.write(entry.name, _packed(tensors[entry.name], entry))
            self._work.add(name, facts if name == names[-1] else True)

    def as_stored(self, layer_id: int, weights: LayerWeights) -> LayerWeights:
        """`weights` after they were stored and read again, rounded in place."""
        entries = {entry.name: entry for entry in self._layer_entries(layer_id)}
        for name, tensor in self._layer_tensors(layer_id, weights):
            form = get_form(_form(entries[name]))
            for part in tensor if tensor.dim() == 3 else (tensor,):
                packed = form.pack(part.numpy())
                part.numpy()[...] = form.unpack(packed, part.shape[-1])
        return weights

    def finish(self) -> list[SizeRow]:
        """Write everything but the layers; returns the table of bytes."""
        tensors = {tensor.entry.name: tensor for tensor in self._dense}
        for name, shard in zip(self._dense_names, self._shards, strict=False):
            write_shard(name, [tensors[entry.name] for entry in shard], self._work)
        write_index(self._work.path, self._shards)
        self._write_small_files()
        spec = self._checkpoint.spec
        routers = {name for layer in spec.moe_layer_ids for name in spec.router_tensor_names(layer)}
        written = [entry for shards in self._layer_shards.values() for s in shards for entry in s]
        expert_bytes = sum(entry.num_bytes for entry in written if entry.name not in routers)
        router_bytes = sum(entry.num_bytes for entry in written if entry.name in routers)
        return size_rows(self._checkpoint, data_bytes(self._dense) + router_bytes, expert_bytes)

    def config_text(self) -> str:
        """config.json with the new counts, and what older readers miss; every other byte stays.

        Raises:
            TargetError: config.json cannot state the new width.
        """
        spec = self._checkpoint.spec
        text = (self._checkpoint.folder / CONFIG_NAME).read_bytes().decode("utf-8")
        if self._num_experts != spec.num_experts:
            text = patch_expert_count(text, spec, self._num_experts)
        if self._width != spec.expert_width:
            text = patch_expert_width(text, spec, self._width)
        return add_older_rope_keys(text, spec)

    def _write_small_files(self) -> None:
        copy_sidecar(self._checkpoint.folder, self._work.path)
        (self._work.path / PLAN_NAME).unlink(missing_ok=True)  # of the source, not of this model
        (self._work.path / CONFIG_NAME).write_bytes(self.config_text().encode("utf-8"))

    def _layer_entries(self, layer_id: int) -> Iterator[TensorEntry]:
        """The layer's router and expert tensors, under their new names, in the order written."""
        checkpoint, spec = self._checkpoint, self._checkpoint.spec
        num_experts, width, hidden = self._num_experts, self._width, spec.hidden_size
        for name in spec.router_tensor_names(layer_id):
            info = checkpoint.tensors[name]
            yield TensorEntry(name, info.dtype, (num_experts, *info.shape[1:]))
        if checkpoint.is_fused:
            shapes = (num_experts, 2 * width, hidden), (num_experts, hidden, width)
            for name, shape in zip(spec.fused_tensor_names(layer_id), shapes, strict=True):
                yield TensorEntry(name, checkpoint.tensors[name].dtype, shape)
            return
        parts = (width, hidden), (width, hidden), (hidden, width)
        for expert_id in range(num_experts):
            names = spec.expert_tensor_names(layer_id, expert_id)
            for name, part in zip(names, parts, strict=True):
                yield TensorEntry(name, checkpoint.tensors[name].dtype, part)

    def _layer_tensors(self, layer_id: int, weights: LayerWeights) -> Iterator[tuple[str, Tensor]]:
        """(name, values) of every entry of the layer; views of `weights`."""
        checkpoint, spec = self._checkpoint, self._checkpoint.spec
        stored = spec.router_tensor_names(layer_id)
        yield from zip(stored, weights.router.values(), strict=True)
        if checkpoint.is_fused:
            names = spec.fused_tensor_names(layer_id)
            yield from zip(names, (weights.gate_up, weights.down), strict=True)
            return
        for expert_id in range(self._num_experts):
            parts = *weights.gate_up[expert_id].chunk(2), weights.down[expert_id]
            yield from zip(spec.expert_tensor_names(layer_id, expert_id), parts, strict=True)


def _dense_tensors(checkpoint: Checkpoint) -> list[SlicedTensor]:
    """Everything but routed experts and routers, in file order."""
    spec = checkpoint.spec
    routers = {name for layer in spec.moe_layer_ids for name in spec.router_tensor_names(layer)}
    return [whole_tensor(info) for info in checkpoint.dense_tensors if info.name not in routers]


def _form(entry: TensorEntry) -> str:
    if entry.dtype not in FORM_OF_DTYPE:
        raise CheckpointError(
            f"tensor {entry.name!r} is {entry.dtype}: transforms write BF16, F16 and F32 only"
        )
    return FORM_OF_DTYPE[entry.dtype]


def _packed(tensor: Tensor, entry: TensorEntry) -> Iterator[bytes]:
    """The tensor's stored bytes, one expert at a time."""
    if tuple(tensor.shape) != entry.shape:
        raise ValueError(f"{entry.name!r} has shape {tuple(tensor.shape)}, expected {entry.shape}")
    form = get_form(_form(entry))
    for part in tensor if tensor.dim() == 3 else (tensor,):
        yield form.pack(part.contiguous().numpy()).tobytes()
