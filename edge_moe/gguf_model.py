"""A quantised GGUF model as a source: what `Checkpoint` is for Hugging Face folders.

Opening it reads headers only; an expert is read and dequantised alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from edge_moe.errors import CheckpointError, SpecError
from edge_moe.formats.ggml_types import GGML_TYPES_BY_NAME
from edge_moe.gguf_arch import GgufShapes, gguf_arch, gguf_spec
from edge_moe.gguf_header import GgufArray, GgufHeader, GgufTensorInfo
from edge_moe.gguf_split import read_parts
from edge_moe.gguf_tensors import (
    LayerTensors,
    expert_layers,
    has_selection_bias,
    is_per_expert,
    layer_of,
)
from edge_moe.gguf_values import read_values, read_whole
from edge_moe.spec import ModelSpec
from edge_moe.tensor_info import FloatArray
from edge_moe.weight_samples import sampled_digest

Types = tuple[str, str, str]
"""Names of the ggml types of (gate_proj, up_proj, down_proj), lower case as forms are."""


class GgufModel:
    """A GGUF file, or the first part of a split one."""

    def __init__(self, path: Path, parts: tuple[GgufHeader, ...] | None = None) -> None:
        """Open `path`, reading headers only. `parts` are its headers where they were already read.

        Raises:
            CheckpointError: missing, truncated or damaged, a part that is missing, or tensors that
                are not understood.
            SpecError: an architecture without a known mixture of experts, or keys that lie.
        """
        self.path = path
        self.parts: tuple[GgufHeader, ...] = parts or read_parts(path)
        header = self.header
        self._has_gate = gguf_arch(header).has_gate
        self.tensors: dict[str, GgufTensorInfo] = {
            info.name: info for part in self.parts for info in part.tensors
        }
        self._all_layers = expert_layers(self.tensors, self._has_gate)
        num_layers = self._num_layers()
        self.layers: dict[int, LayerTensors] = {
            layer_id: layer for layer_id, layer in self._all_layers.items() if layer_id < num_layers
        }
        if not self.layers:
            raise SpecError(f"{path}: no layer is a mixture of experts; edge-moe needs a MoE model")
        self.spec: ModelSpec = gguf_spec(header, self._shapes())
        self._check_tensors()

    @property
    def header(self) -> GgufHeader:
        """The first part's, which holds the metadata."""
        return self.parts[0]

    @property
    def location(self) -> Path:
        """The file that was opened."""
        return self.path

    @property
    def file_bytes(self) -> int:
        """Of all parts together."""
        return sum(part.total_bytes for part in self.parts)

    @cached_property
    def expert_tensors(self) -> frozenset[str]:
        """Names of the matrices that hold routed experts, in the layers that are used."""
        return frozenset(info.name for layer in self.layers.values() for info in layer.stacks)

    @cached_property
    def unused_tensors(self) -> frozenset[str]:
        """Tensors of layers past `num_layers` (multi-token prediction): not loaded by default."""
        return frozenset(
            name for name in self.tensors if (layer_of(name) or 0) >= self.spec.num_layers
        )

    @cached_property
    def per_expert_tensors(self) -> tuple[GgufTensorInfo, ...]:
        """Every tensor whose slowest axis counts experts, in file order, unused layers included."""
        count = self.spec.num_experts
        return tuple(info for info in self.tensors.values() if is_per_expert(info, count))

    @cached_property
    def dense_tensors(self) -> tuple[GgufTensorInfo, ...]:
        """Everything that is loaded but the routed experts' matrices, in file order."""
        skipped = self.expert_tensors | self.unused_tensors
        return tuple(info for name, info in self.tensors.items() if name not in skipped)

    @cached_property
    def dense_bytes(self) -> int:
        """Bytes of `dense_tensors`."""
        return sum(info.num_bytes for info in self.dense_tensors)

    @cached_property
    def total_parameters(self) -> int:
        """Of all tensors that are loaded."""
        loaded = self.tensors.keys() - self.unused_tensors
        return sum(math.prod(self.tensors[name].shape) for name in loaded)

    @cached_property
    def active_parameters(self) -> int:
        """Those that one token uses, embeddings included."""
        idle_experts = self.spec.num_moe_layers * (self.spec.num_experts - self.spec.top_k)
        return self.total_parameters - idle_experts * self.spec.expert_weights

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over each part's header and a sample of every matrix, whatever their names."""
        return parts_fingerprint(self.parts)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """sha256 over the keys `tokenizer.*` as they stand in the file, in the order of names."""
        digest = hashlib.sha256()
        for key in sorted(self.header.key_spans):
            if key.startswith("tokenizer."):
                digest.update(self.header.raw_key(key))
        return digest.hexdigest()

    def stored_types(self, layer_id: int) -> Types:
        """Types of a layer's experts: (gate_proj, up_proj, down_proj)."""
        gate, up, down = self.layers[layer_id].projections
        return gate.type_name.lower(), up.type_name.lower(), down.type_name.lower()

    def projection_bytes(self, layer_id: int) -> tuple[int, int, int]:
        """Stored bytes of one expert's (gate_proj, up_proj, down_proj) in this layer."""
        ranges = self.expert_ranges(layer_id, 0)
        return ranges[0][2], ranges[1][2], ranges[2][2]

    def expert_bytes(self, layer_id: int) -> int:
        """Stored bytes of one expert's matrices in this layer."""
        return sum(self.projection_bytes(layer_id))

    def expert_ranges(
        self, layer_id: int, expert_id: int
    ) -> tuple[tuple[GgufTensorInfo, int, int], ...]:
        """Of (gate_proj, up_proj, down_proj): the tensor, the first byte in its file, the bytes."""
        layer = self.layers[layer_id]
        found = []
        for part, info in enumerate(layer.projections):
            stride = info.num_bytes // self.spec.num_experts
            start, num_bytes = info.offset + expert_id * stride, stride
            if info is layer.gate_up:
                num_bytes = stride // 2
                start += part * num_bytes
            elif part == 0 and not self._has_gate:
                num_bytes = 0
            found.append((info, start, num_bytes))
        return tuple(found)

    def expert(
        self, layer_id: int, expert_id: int, *, with_scales: bool = True
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(gate_proj [I, H], up_proj [I, H], down_proj [H, I]) of one expert, float32.

        Without a gate gate_proj is [0, H]. A `.scale` tensor, where there is one, is multiplied in,
        or left out. Reads that expert's bytes only; memory: one expert packed and one in float32.

        Raises:
            CheckpointError: NaN or infinity, or a file that was truncated since.
            MissingExtraError: a type that only the extra `gguf` can dequantise.
        """
        up, down = self.spec.expert_width, self.spec.expert_hidden
        shapes = ((up if self._has_gate else 0, down), (up, down), (down, up))
        scales = self._scales(layer_id, expert_id) if with_scales else (1.0, 1.0, 1.0)
        matrices = [
            read_values(*where, shape) * scale if scale != 1.0 else read_values(*where, shape)
            for where, shape, scale in zip(
                self.expert_ranges(layer_id, expert_id), shapes, scales, strict=True
            )
        ]
        return matrices[0], matrices[1], matrices[2]

    def expert_biases(
        self, layer_id: int, expert_id: int
    ) -> tuple[FloatArray, FloatArray, FloatArray] | None:
        """(gate [I], up [I], down [H]) that an expert adds; None where it adds nothing."""
        gate, up, down = (
            self._row(f"{info.name.removesuffix('.weight')}.bias", expert_id)
            for info in self.layers[layer_id].projections
        )
        if gate is None or up is None or down is None:
            return None
        if self.layers[layer_id].gate_up is not None:
            gate, up = np.split(gate, 2)
        return gate, up, down

    def read(self, name: str) -> FloatArray:
        """Tensor `name` as float32. Memory: one tensor packed and one in float32.

        Raises:
            CheckpointError: unknown name, NaN or infinity.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing: download it again")
        info = self.tensors[name]
        return read_whole(info)

    def _scales(self, layer_id: int, expert_id: int) -> tuple[float, float, float]:
        """Factors of (gate, up, down); merged gate and up take that of up, as llama.cpp does."""
        prefix = f"blk.{layer_id}.ffn_"
        is_merged = self.layers[layer_id].gate_up is not None
        names = ("up" if is_merged else "gate", "up", "down")
        rows = [self._row(f"{prefix}{name}_exps.scale", expert_id) for name in names]
        gate, up, down = (1.0 if row is None else float(row.reshape(-1)[0]) for row in rows)
        return gate, up, down

    def _row(self, name: str, expert_id: int) -> FloatArray | None:
        """Row `expert_id` of a small tensor of floats; None where there is no such tensor."""
        info = self.tensors.get(name)
        if info is None:
            return None
        stride = info.num_bytes // self.spec.num_experts
        shape = info.shape[1:] or (1,)
        return read_values(info, info.offset + expert_id * stride, stride, shape)

    def _num_layers(self) -> int:
        """Layers that are loaded: all but those for multi-token prediction."""
        value, name = self.header.number("block_count"), f"{self.header.architecture}.block_count"
        if value is None or not 1 <= value <= len(self.tensors):
            raise SpecError(
                f"{self.path}: the key {name} is {value!r}, expected a number of layers that "
                f"{len(self.tensors)} tensors can fill: download or export the file again"
            )
        return value - (self.header.number("nextn_predict_layers") or 0)

    def _shapes(self) -> GgufShapes:
        widths = {
            layer.down.shape[2] if len(layer.down.shape) == 3 else 0
            for layer in self.layers.values()
        }
        if len(widths) != 1 or 0 in widths:
            raise SpecError(
                f"{self.path}: the experts of different layers have the inner widths "
                f"{sorted(widths)}; edge-moe needs one width for all"
            )
        tokens = self.header.metadata.get("tokenizer.ggml.tokens")
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError(
                f"{self.path}: the tensor 'token_embd.weight' is missing: download it again"
            )
        vocab_size = tokens.count if isinstance(tokens, GgufArray) else embedding.shape[0]
        return GgufShapes(
            moe_layer_ids=tuple(self.layers),
            expert_width=widths.pop(),
            vocab_size=vocab_size,
            has_selection_bias=has_selection_bias(self.tensors),
            has_output="output.weight" in self.tensors,
        )

    def _check_tensors(self) -> None:
        """Matrices have the shapes that the metadata implies, and experts are whole blocks."""
        spec = self.spec
        width, hidden = spec.expert_width, spec.expert_hidden
        up, down, merged = (width, hidden), (hidden, width), (2 * width, hidden)
        for layer in self._all_layers.values():
            wanted = ((layer.gate, up), (layer.up, up), (layer.gate_up, merged), (layer.down, down))
            for info, shape in wanted:
                if info is not None:
                    self._check_stack(info, (spec.num_experts, *shape))
        for layer_id in self._all_layers:
            if f"blk.{layer_id}.ffn_gate_inp.weight" not in self.tensors:
                raise CheckpointError(
                    f"{self.path}: layer {layer_id} has experts but no router "
                    f"'blk.{layer_id}.ffn_gate_inp.weight': download it again"
                )
        for info in self.per_expert_tensors:
            self._check_slices(info)

    def _check_stack(self, info: GgufTensorInfo, shape: tuple[int, ...]) -> None:
        if info.shape != shape:
            raise CheckpointError(
                f"{info.path}: {info.name!r} has shape {list(info.shape)}, the metadata implies "
                f"{list(shape)}: download or export the file again"
            )

    def _check_slices(self, info: GgufTensorInfo) -> None:
        """A row of the slowest axis must be a whole number of blocks, or it cannot be cut out."""
        weights = math.prod(info.shape[1:])
        block_size = GGML_TYPES_BY_NAME[info.type_name].block_size
        if weights % block_size:
            raise CheckpointError(
                f"{info.path}: {info.name!r} holds {weights} {info.type_name} weights per expert, "
                f"which is no whole number of blocks of {block_size}: store this tensor as F32"
            )


def parts_fingerprint(parts: Iterable[GgufHeader]) -> str:
    """sha256 over each part's header and a sample of every matrix; file names do not count."""
    digest = hashlib.sha256(b"gguf")
    for part in parts:
        digest.update(sampled_digest(part.path, part.data_start, part.tensors))
    return digest.hexdigest()
