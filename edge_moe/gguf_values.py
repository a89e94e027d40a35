"""Weights of a GGUF file as float32."""

from __future__ import annotations

import math

import numpy as np

from edge_moe.errors import CheckpointError
from edge_moe.formats.dequantise import dequantise
from edge_moe.gguf_header import GgufTensorInfo
from edge_moe.tensor_info import FloatArray, read_range


def read_values(
    info: GgufTensorInfo, offset: int, num_bytes: int, shape: tuple[int, ...]
) -> FloatArray:
    """The part of `info` that lies at `offset` of its file. Memory: it packed, and in float32.

    Raises:
        CheckpointError: NaN or infinity.
    """
    raw = read_range(info.path, offset, num_bytes)
    values = dequantise(info.type_name, raw, math.prod(shape)).reshape(shape)
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{info.path}: {info.name!r} holds NaN or infinity; the file is damaged: "
            "download it again"
        )
    return values


def read_whole(info: GgufTensorInfo) -> FloatArray:
    """All of `info`, as `read_values` reads a part."""
    return read_values(info, info.offset, info.num_bytes, info.shape)
