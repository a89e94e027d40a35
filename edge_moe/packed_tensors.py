"""Tensors that a checkpoint stores in 8 or 4 bits with scales, read as what they stand for.

FP8 (DeepSeek-V3, MiniMax-M2, Qwen3-...-FP8): `X.weight` F8_E4M3 [rows, columns] and
`X.weight_scale_inv` [rows / b, columns / b], one factor per block of b x b, b 128 as a rule.

MXFP4 (gpt-oss): `X_blocks` U8 [experts, rows, columns / 32, 16], two values of 4 bits (E2M1) per
byte, the lower bits first, and `X_scales` U8 [experts, rows, columns / 32], exponents of two with
a bias of 127 (OCP Microscaling Formats 1.0).

Values are rounded to bfloat16, as transformers does when it loads such a file without quantising.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edge_moe.errors import CheckpointError, SpecError
from edge_moe.tensor_info import FloatArray, TensorInfo, read_range, to_float32

_CHUNK_WEIGHTS = 2**22
_SCALE_SUFFIX = "_scale_inv"
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4_VALUES = np.concatenate([_E2M1, -_E2M1])
_EXPONENT_BIAS = 127
_NAN_SCALE = 255


class Packing(Protocol):
    """How the values of a tensor are stored."""

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The tensors in the file that it is made of."""

    def rows(self) -> Iterator[FloatArray]:
        """The values in order, some rows [n, columns] at a time, float32 that bfloat16 holds."""


@dataclass(frozen=True)
class PackedInfo(TensorInfo):
    """A tensor that is stored packed; `dtype`, `shape` and `num_bytes` are those of its values."""

    packing: Packing = field(kw_only=True)

    @property
    def stored_bytes(self) -> int:
        return sum(info.num_bytes for info in self.packing.stored)

    def values(self) -> FloatArray:
        """All of them, float32. Memory: the result and one chunk.

        Raises:
            CheckpointError: NaN or infinity.
        """
        result = np.empty((math.prod(self.shape[:-1]), self.shape[-1]), np.float32)
        start = 0
        for chunk in self.packing.rows():
            result[start : start + len(chunk)] = self._checked(chunk)
            start += len(chunk)
        return result.reshape(self.shape)

    def expert_values(self, expert_id: int) -> FloatArray:
        """[rows, columns] float32 of one expert of a stack."""
        if not isinstance(self.packing, Mxfp4Stack):
            raise CheckpointError(
                f"{self.path}: {self.name!r} is a packed stack of experts that edge-moe does not "
                "read: give it the original bf16 checkpoint"
            )
        return self._checked(self.packing.expert(expert_id))

    def chunks(self) -> Iterator[bytes]:
        """The values as bfloat16 bytes. Memory: one chunk."""
        for chunk in self.packing.rows():
            yield (self._checked(chunk).view(np.uint32) >> 16).astype("<u2").tobytes()

    def _checked(self, values: FloatArray) -> FloatArray:
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{self.path}: {self.name!r} holds NaN or infinity; the checkpoint is damaged: "
                "download it again"
            )
        return values


@dataclass(frozen=True)
class Fp8Blocks:
    """A matrix of F8_E4M3 with a factor per block."""

    weights: TensorInfo
    scales: TensorInfo
    block: tuple[int, int]

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return self.weights, self.scales

    def rows(self) -> Iterator[FloatArray]:
        num_rows, columns = self.weights.shape
        scales = _floats(self.scales)
        for start in range(0, num_rows, self.block[0]):
            stop = min(start + self.block[0], num_rows)
            codes = _bytes(self.weights, start * columns, (stop - start) * columns)
            step = min(self.block[1], columns)  # a block may be wider than the matrix
            factors = np.repeat(scales[start // self.block[0]], step)[:columns]
            yield to_bfloat16(_E4M3[codes].reshape(-1, columns) * factors)


@dataclass(frozen=True)
class Mxfp4Stack:
    """A stack [E, rows, columns] of 4-bit values with an exponent per 32 of a row."""

    blocks: TensorInfo
    scales: TensorInfo

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return self.blocks, self.scales

    @property
    def shape(self) -> tuple[int, int, int]:
        num_experts, rows, groups = self.scales.shape
        return num_experts, rows, 32 * groups

    def expert(self, expert_id: int) -> FloatArray:
        """[rows, columns] of one expert. Memory: it, its codes and its values once more."""
        _, rows, columns = self.shape
        return self._read(expert_id * rows, rows).reshape(rows, columns)

    def rows(self) -> Iterator[FloatArray]:
        num_experts, rows, columns = self.shape
        step = max(1, _CHUNK_WEIGHTS // columns)
        for start in range(0, num_experts * rows, step):
            yield self._read(start, min(step, num_experts * rows - start))

    def _read(self, start: int, count: int) -> FloatArray:
        groups = self.scales.shape[2]
        codes = _bytes(self.blocks, start * groups * 16, count * groups * 16)
        exponents = _bytes(self.scales, start * groups, count * groups)
        if (exponents == _NAN_SCALE).any():
            raise CheckpointError(
                f"{self.scales.path}: {self.scales.name!r} holds NaN; the checkpoint is damaged: "
                "download it again"
            )
        values = np.empty((count * groups, 32), np.float32)
        pairs = codes.reshape(-1, 16)
        values[:, 0::2], values[:, 1::2] = _FP4_VALUES[pairs & 15], _FP4_VALUES[pairs >> 4]
        powers = exponents.astype(np.int32) - _EXPONENT_BIAS
        scaled: FloatArray = np.ldexp(values, powers[:, None])
        return scaled.reshape(count, groups * 32)


def unpacked_tensors(
    stored: Mapping[str, TensorInfo], config: Mapping[str, Any], source: str
) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint with packed ones as `PackedInfo`, their scales left out.

    Raises:
        SpecError: a way of packing that is not known.
        CheckpointError: codes without scales, or of shapes that do not belong together.
    """
    settings = config.get("quantization_config")
    if not settings:
        return dict(stored)
    if not isinstance(settings, Mapping):
        raise SpecError(
            f"{source}: quantization_config is {settings!r}, expected a table: "
            "correct the file or download it again"
        )
    method = str(settings.get("quant_method"))
    if method == "mxfp4":
        return _with(stored, _mxfp4(stored))
    if method == "fp8":
        return _with(stored, _fp8(stored, _fp8_block(settings, source)))
    raise SpecError(
        f"{source}: the checkpoint is already quantised ({method}); edge-moe reads fp8 and mxfp4 "
        "ones, and otherwise wants the original bf16, f16 or f32 checkpoint"
    )


def to_bfloat16(values: FloatArray) -> FloatArray:
    """float32 rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    result: FloatArray = np.where(np.isnan(values), values, rounded.view(np.float32))
    return result


def _with(stored: Mapping[str, TensorInfo], packed: list[PackedInfo]) -> dict[str, TensorInfo]:
    """`stored`, with `packed` in the place of the first tensor each is made of."""
    places = {info.packing.stored[0].name: info for info in packed}
    gone = {part.name for info in packed for part in info.packing.stored[1:]}
    found: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        if name not in gone:
            logical = places.get(name, info)
            found[logical.name] = logical
    return found


def _packed(name: str, packing: Packing, shape: tuple[int, ...]) -> PackedInfo:
    first = packing.stored[0]
    return PackedInfo(name, first.path, "BF16", shape, 0, 2 * math.prod(shape), packing=packing)


def _fp8_block(settings: Mapping[str, Any], source: str) -> tuple[int, int]:
    block = settings.get("weight_block_size")
    is_pair = isinstance(block, list) and len(block) == 2
    if not isinstance(block, list) or not is_pair or not all(map(_is_size, block)):
        raise SpecError(
            f"{source}: fp8 with weight_block_size={block!r} is not supported, only two numbers: "
            "give edge-moe the original bf16 checkpoint"
        )
    return block[0], block[1]


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _fp8(stored: Mapping[str, TensorInfo], block: tuple[int, int]) -> list[PackedInfo]:
    found = []
    for name, info in stored.items():
        if info.dtype != "F8_E4M3":
            continue
        scales = _companion(stored, info, name + _SCALE_SUFFIX)
        wanted = tuple(-(-size // step) for size, step in zip(info.shape, block, strict=False))
        if len(info.shape) != 2 or scales.shape != wanted:
            raise CheckpointError(
                f"{info.path}: {name!r} of shape {list(info.shape)} in blocks of {list(block)} "
                f"needs scales of shape {list(wanted)}, found {list(scales.shape)}: download the "
                "checkpoint again"
            )
        found.append(_packed(name, Fp8Blocks(info, scales, block), info.shape))
    return found


def _mxfp4(stored: Mapping[str, TensorInfo]) -> list[PackedInfo]:
    found = []
    for name, info in stored.items():
        if not name.endswith("_blocks"):
            continue
        base = name.removesuffix("_blocks")
        scales = _companion(stored, info, f"{base}_scales")
        is_uint8 = info.dtype == scales.dtype == "U8"
        is_stack = len(scales.shape) == 3 and min(scales.shape) > 0
        if not is_uint8 or not is_stack or info.shape != (*scales.shape, 16):
            raise CheckpointError(
                f"{info.path}: {name!r} is {info.dtype} {list(info.shape)}, its scales "
                f"{scales.dtype} {list(scales.shape)}: they do not belong together; download the "
                "checkpoint again"
            )
        packing = Mxfp4Stack(info, scales)
        found.append(_packed(base, packing, packing.shape))
    return found


def _companion(stored: Mapping[str, TensorInfo], info: TensorInfo, name: str) -> TensorInfo:
    if name not in stored:
        raise CheckpointError(
            f"{info.path}: {info.name!r} has no scales {name!r}: download the checkpoint again"
        )
    return stored[name]


def _bytes(info: TensorInfo, start: int, count: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(read_range(info.path, info.offset + start, count), np.uint8)


def _floats(info: TensorInfo) -> FloatArray:
    """A small tensor of plain floats."""
    if info.dtype not in ("F32", "BF16"):
        raise CheckpointError(f"{info.path}: {info.name!r} is {info.dtype}, expected F32 or BF16")
    raw = read_range(info.path, info.offset, info.num_bytes)
    return to_float32(raw, info.dtype).reshape(info.shape)


def _e4m3_values() -> FloatArray:
    """All 256 values of F8_E4M3: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    values = np.where((exponent == 15) & (mantissa == 7), np.nan, values)
    return np.where(codes >> 7, -values, values).astype(np.float32)


_E4M3 = _e4m3_values()
