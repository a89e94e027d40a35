"""A Hugging Face checkpoint as byte ranges: one tensor at a time, never the model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from edge_moe.config_reader import read_config, text_config
from edge_moe.dense_shapes import dense_shapes
from edge_moe.errors import CheckpointError, InputError
from edge_moe.gguf_split import is_gguf_name
from edge_moe.json_files import read_json
from edge_moe.onnx_folder import is_onnx_folder
from edge_moe.packed_tensors import PackedInfo, unpacked_tensors
from edge_moe.safetensors_header import data_start, read_header
from edge_moe.spec import ModelSpec
from edge_moe.tensor_info import FloatArray, TensorInfo, read_range, to_float32
from edge_moe.weight_samples import sampled_digest

_FLOAT_DTYPES = ("BF16", "F16", "F32")
_PIECE_BYTES = 16 * 2**20


class Checkpoint:
    """A local Hugging Face checkpoint folder. Opening it reads headers only."""

    def __init__(self, folder: Path, tensors: dict[str, TensorInfo] | None = None) -> None:
        """Open `folder`. `tensors` are its headers where they were already read, as from a hub.

        Raises:
            InputError: `folder` is a GGUF file.
            SpecError: config.json is missing or not supported.
            CheckpointError: a weight file is missing, truncated, or lacks expected tensors.
        """
        if is_gguf_name(folder) and folder.is_file():
            raise InputError(
                f"{folder} is a GGUF file, which only inspect, calibrate, plan, build, eval "
                "and run read: give the Hugging Face folder that it was made from"
            )
        self.folder = folder
        config_path = folder / "config.json"
        config = read_config(config_path)
        spec = ModelSpec.from_config(config, source=str(config_path))
        stored = read_all_headers(folder) if tensors is None else tensors
        self.tensors = unpacked_tensors(stored, text_config(config), str(config_path))
        """By name; packed ones as what they stand for."""
        self.spec = spec.with_names_of(self.tensors)
        self._check_counts()
        self._check_tensors(dense_shapes(self.spec, text_config(config), str(config_path)))

    @property
    def location(self) -> Path:
        """What messages call the model."""
        return self.folder

    @cached_property
    def is_fused(self) -> bool:
        """Experts are stored stacked, [E, 2I, H] and [E, H, I], instead of one by one."""
        return self.spec.fused_tensor_names(self.spec.moe_layer_ids[0])[0] in self.tensors

    @cached_property
    def expert_tensors(self) -> frozenset[str]:
        """Names of every tensor that holds routed experts."""
        spec = self.spec
        if self.is_fused:
            names = [spec.fused_tensor_names(layer) for layer in spec.moe_layer_ids]
            return frozenset(name for pair in names for name in pair)
        return frozenset(
            name
            for layer in spec.moe_layer_ids
            for expert in range(spec.num_experts)
            for name in spec.expert_tensor_names(layer, expert)
        )

    @cached_property
    def unused_tensors(self) -> frozenset[str]:
        """Tensors of multi-token prediction, layers past `num_layers` or under a name of their own:
        never loaded. They hold routers and experts too, so they do not follow when experts go."""
        num_layers = self.spec.num_layers
        prefixes = tuple(
            self.spec.layer_prefix(layer) for layer in range(num_layers, num_layers + 16)
        )
        return frozenset(
            name for name in self.tensors if name.startswith(prefixes) or self.spec.is_draft(name)
        )

    @cached_property
    def other_tensors(self) -> tuple[TensorInfo, ...]:
        """Those of other parts than the language model, such as a vision tower: never loaded."""
        return tuple(
            info
            for name, info in self.tensors.items()
            if not self.spec.is_part_of_language_model(name) and name not in self.unused_tensors
        )

    @cached_property
    def dense_tensors(self) -> tuple[TensorInfo, ...]:
        """Everything that is not a routed expert, in file order."""
        others = {info.name for info in self.other_tensors}
        skipped = self.expert_tensors | self.unused_tensors | others
        return tuple(info for name, info in self.tensors.items() if name not in skipped)

    @cached_property
    def total_parameters(self) -> int:
        """Of all tensors that are loaded."""
        loaded = self.tensors.keys() - self.unused_tensors
        loaded -= {info.name for info in self.other_tensors}
        return sum(math.prod(self.tensors[name].shape) for name in loaded)

    @cached_property
    def active_parameters(self) -> int:
        """Those that one token uses, embeddings included."""
        idle_experts = self.spec.num_moe_layers * (self.spec.num_experts - self.spec.top_k)
        return self.total_parameters - idle_experts * self.spec.expert_weights

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config.json, every header and a sample of every matrix."""
        return checkpoint_fingerprint(self.folder, self.tensors.values())

    def read(self, name: str) -> FloatArray:
        """Tensor `name` as float32. Memory: one tensor in its own dtype plus one in float32.

        Raises:
            CheckpointError: unknown name, a dtype that is not a plain float, NaN or infinity.
        """
        info = self._info(name)
        if isinstance(info, PackedInfo):
            return info.values()
        return self._checked(info, info.offset, info.num_bytes).reshape(info.shape)

    def read_raw(self, name: str) -> bytes:
        """The stored bytes of tensor `name`."""
        info = self._info(name)
        return read_range(info.path, info.offset, info.num_bytes)

    def expert(self, layer_id: int, expert_id: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(gate_proj [I, H], up_proj [I, H], down_proj [H, I]) of one expert, float32.

        Memory: one expert in its own dtype plus one in float32.
        """
        if not self.is_fused:
            names = self.spec.expert_tensor_names(layer_id, expert_id)
            *gates, up, down = (self.read(name) for name in names)
            return gates[0] if gates else self._no_gate(), up, down
        gate_up_name, down_name = self.spec.fused_tensor_names(layer_id)
        gate_up = self._row_block(gate_up_name, expert_id)
        down = self._row_block(down_name, expert_id)
        if self.has_packed_experts and self.spec.family.is_transposed:  # gate and up taking turns
            return gate_up[::2], gate_up[1::2], down
        if self.spec.family.is_transposed:  # [H, 2I], gate and up taking turns; [I, H]
            return _turned(gate_up[:, ::2]), _turned(gate_up[:, 1::2]), _turned(down)
        if not self.spec.has_gate:
            return self._no_gate(), gate_up, down
        gate, up = np.split(gate_up, 2)
        return gate, up, down

    def _no_gate(self) -> FloatArray:
        """The gate_proj of experts that have none: no rows."""
        return np.empty((0, self.spec.expert_hidden), np.float32)

    def projection(self, layer_id: int, expert_id: int, index: int) -> FloatArray:
        """gate_proj, up_proj or down_proj of one expert (0, 1, 2), float32.

        Memory: as for `expert`, or one projection where they are stored on their own.
        """
        if self.is_fused or not self.spec.has_gate:
            return self.expert(layer_id, expert_id)[index]
        return self.read(self.spec.expert_tensor_names(layer_id, expert_id)[index])

    @cached_property
    def has_contiguous_experts(self) -> bool:
        """Every row of gate_proj, up_proj and down_proj is one range of bytes."""
        is_turned = self.is_fused and self.spec.family.is_transposed
        return not (is_turned or self.has_packed_experts)

    @cached_property
    def has_packed_experts(self) -> bool:
        """Experts are stored in 8 or 4 bits with scales."""
        layer_id, spec = self.spec.moe_layer_ids[0], self.spec
        if self.is_fused:
            return isinstance(self._info(spec.fused_tensor_names(layer_id)[1]), PackedInfo)
        return isinstance(self._info(spec.expert_tensor_names(layer_id, 0)[-1]), PackedInfo)

    def expert_dtypes(self, layer_id: int, expert_id: int) -> tuple[str, ...]:
        """Stored dtypes of (gate_proj, up_proj, down_proj)."""
        if self.is_fused:
            gate_up, down = (self._info(name) for name in self.spec.fused_tensor_names(layer_id))
            return gate_up.dtype, gate_up.dtype, down.dtype
        names = self.spec.expert_tensor_names(layer_id, expert_id)
        return tuple(self._info(name).dtype for name in names)

    def expert_ranges(self, layer_id: int, expert_id: int) -> tuple[TensorInfo, ...]:
        """Stored byte ranges of one expert: gate_proj if any, up_proj, down_proj, stacked or not.

        Raises:
            ValueError: `has_contiguous_experts` is false.
        """
        spec = self.spec
        if not self.has_contiguous_experts:
            raise ValueError("the rows of these experts are scattered")
        if not self.is_fused:
            names = spec.expert_tensor_names(layer_id, expert_id)
            return tuple(self._info(name) for name in names)
        gate_up, down = (self._info(name) for name in spec.fused_tensor_names(layer_id))
        if not spec.has_gate:
            return gate_up.row(expert_id), down.row(expert_id)
        shape = (spec.expert_width, spec.expert_hidden)
        part_bytes = gate_up.num_bytes // spec.num_experts // 2
        start = gate_up.offset + 2 * part_bytes * expert_id
        return (
            TensorInfo(gate_up.name, gate_up.path, gate_up.dtype, shape, start, part_bytes),
            TensorInfo(
                gate_up.name, gate_up.path, gate_up.dtype, shape, start + part_bytes, part_bytes
            ),
            TensorInfo(
                down.name,
                down.path,
                down.dtype,
                shape[::-1],
                down.offset + down.num_bytes // spec.num_experts * expert_id,
                down.num_bytes // spec.num_experts,
            ),
        )

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} is missing from the checkpoint: download it again"
            )
        return self.tensors[name]

    def _row_block(self, name: str, index: int) -> FloatArray:
        """`tensor[index]` of a stacked tensor, reading only its own bytes."""
        info = self._info(name)
        if isinstance(info, PackedInfo):
            return info.expert_values(index)
        block_bytes = info.num_bytes // info.shape[0]
        flat = self._checked(info, info.offset + index * block_bytes, block_bytes)
        return flat.reshape(info.shape[1:])

    def _checked(self, info: TensorInfo, offset: int, num_bytes: int) -> FloatArray:
        _require_float(info)
        values = to_float32(read_range(info.path, offset, num_bytes), info.dtype)
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{info.path}: {info.name!r} holds NaN or infinity; the checkpoint is damaged: "
                "download it again"
            )
        return values

    def check_finite(self, name: str) -> None:
        """Read tensor `name` in pieces of 16 MiB.

        Raises:
            CheckpointError: as for `read`.
        """
        info = self._info(name)
        if isinstance(info, PackedInfo):
            for _ in info.chunks():
                pass
            return
        for start in range(0, info.num_bytes, _PIECE_BYTES):
            self._checked(info, info.offset + start, min(_PIECE_BYTES, info.num_bytes - start))

    def _check_counts(self) -> None:
        """Names are made for every layer and expert: no more of them than there are tensors."""
        spec = self.spec
        per_layer = 1 if self.is_fused else spec.num_experts * len(spec.family.projections)
        wanted = max(spec.num_layers, spec.num_moe_layers * per_layer)
        if wanted > len(self.tensors):
            raise CheckpointError(
                f"{self.folder}: at least {wanted - len(self.tensors)} tensors that config.json "
                f"promises are missing ({spec.num_layers} layers, {spec.num_experts} experts in "
                f"{spec.num_moe_layers} of them); a weight file may not have been downloaded"
            )

    def _check_tensors(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """What config.json promises is there; `shapes` are those of the dense part."""
        routers = [
            name
            for layer in self.spec.moe_layer_ids
            for name in self.spec.router_tensor_names(layer)
        ]
        wanted = (*sorted(self.expert_tensors), *shapes, *routers)
        missing = [name for name in wanted if name not in self.tensors]
        if missing:
            raise CheckpointError(
                f"{self.folder}: {len(missing)} tensors that config.json promises are missing, "
                f"first {missing[0]!r}; a weight file may not have been downloaded"
            )
        self._check_shapes(shapes)
        self._check_plain((self.spec.embedding_name, self.spec.final_norm_name, *routers))
        for name in routers:
            if expert_axis(self.tensors[name], self.spec.num_experts) is None:
                raise CheckpointError(
                    f"{self.tensors[name].path}: {name!r} of shape "
                    f"{list(self.tensors[name].shape)} has no row for each of the "
                    f"{self.spec.num_experts} experts of config.json: download both again"
                )
        for layer_id in self.spec.moe_layer_ids:
            self._check_shapes(self._expert_shapes(layer_id))
        for info in (*self.dense_tensors, *(self.tensors[name] for name in self.expert_tensors)):
            _require_float(info)

    def _check_plain(self, names: Iterable[str]) -> None:
        """Rows of these are read one by one, so they may not be packed."""
        for name in names:
            if isinstance(self.tensors[name], PackedInfo):
                raise CheckpointError(
                    f"{self.folder}: {name!r} is stored packed, which edge-moe only reads of "
                    "linear layers and experts: give it the original bf16 checkpoint"
                )

    def _expert_shapes(self, layer_id: int) -> dict[str, tuple[int, ...]]:
        spec = self.spec
        up, down = (spec.expert_width, spec.expert_hidden), (spec.expert_hidden, spec.expert_width)
        expected: dict[str, tuple[int, ...]] = {}
        if self.is_fused:
            gate_up_name, down_name = spec.fused_tensor_names(layer_id)
            gate_up = spec.inner_rows, up[1]
            if spec.family.is_transposed and not self.has_packed_experts:
                gate_up, down = gate_up[::-1], down[::-1]
            expected[gate_up_name] = (spec.num_experts, *gate_up)
            expected[down_name] = (spec.num_experts, *down)
        else:
            for expert_id in range(spec.num_experts):
                names = spec.expert_tensor_names(layer_id, expert_id)
                expected.update(zip(names, (up, up, down)[-len(names) :], strict=True))
        return expected

    def _check_shapes(self, expected: dict[str, tuple[int, ...]]) -> None:
        for name, shape in expected.items():
            found = self.tensors[name].shape
            if found != shape:
                raise CheckpointError(
                    f"{self.tensors[name].path}: {name!r} has shape {list(found)}, "
                    f"config.json implies {list(shape)}: one of the two files belongs to another "
                    "model or was edited; download both again"
                )


def expert_axis(info: TensorInfo, num_experts: int) -> int | None:
    """The axis of a router's tensor along which experts lie: 0, or 1 after an axis of one row."""
    if info.shape[:1] == (num_experts,):
        return 0
    return 1 if info.shape == (1, num_experts) else None


def _turned(matrix: FloatArray) -> FloatArray:
    return np.ascontiguousarray(matrix.T)


def _require_float(info: TensorInfo) -> None:
    if info.dtype not in _FLOAT_DTYPES:
        raise CheckpointError(
            f"{info.path}: {info.name!r} is {info.dtype}; edge-moe reads BF16, F16 and F32 "
            "checkpoints, so give it the unquantised one"
        )


def checkpoint_fingerprint(folder: Path, tensors: Iterable[TensorInfo]) -> str:
    """sha256 over config.json, every header and a sample of every matrix."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    ranges: dict[Path, list[TensorInfo]] = {}
    for info in tensors:
        for stored in info.packing.stored if isinstance(info, PackedInfo) else (info,):
            ranges.setdefault(stored.path, []).append(stored)
    for path in sorted(ranges):
        digest.update(path.name.encode())
        digest.update(sampled_digest(path, data_start(path), ranges[path]))
    return digest.hexdigest()


def read_all_headers(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the safetensors files in `folder`, by name.

    Raises:
        CheckpointError: a file is missing, truncated or contradicts itself.
        InputError: `folder` holds an ONNX decoder.
    """
    tensors: dict[str, TensorInfo] = {}
    for path in _weight_files(folder):
        tensors.update(read_header(path)[0])
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if single.exists():
            return [single]
        if is_onnx_folder(folder):
            raise InputError(
                f"{folder} holds an ONNX decoder, which only run and eval read: give the Hugging "
                "Face folder that it was made from"
            )
        raise CheckpointError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json: "
            "edge-moe reads safetensors checkpoints"
        )
    missing = f"{index} does not exist: download the checkpoint again"
    content = read_json(index, CheckpointError, missing=missing, damaged="download it again")
    try:
        names = sorted(set(content["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{index} holds no table 'weight_map' of file names: download it again"
        ) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                f"{index}: weight file {name!r} points outside the folder: download it again"
            )
    return [folder / name for name in names]
