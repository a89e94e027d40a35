"""Plain floating-point forms: f32, f16, bf16. One weight is one block; bytes are little-endian."""

from __future__ import annotations

import numpy as np

from edge_moe.formats.base import ByteArray, FloatArray, Form, register
from edge_moe.formats.blocks import check_row_bytes, require_below


@register
class F32(Form):
    """float32."""

    name = "f32"
    label = "32-bit"
    ggml_type = 0
    block_size = 1
    block_bytes = 4

    def pack(self, weights: FloatArray) -> ByteArray:
        require_below(self, weights, float("inf"))
        return np.ascontiguousarray(weights, dtype="<f4").view(np.uint8)

    def unpack(self, packed: ByteArray, width: int) -> FloatArray:
        check_row_bytes(self, packed, width)
        return np.ascontiguousarray(packed).view("<f4").astype(np.float32)


@register
class F16(Form):
    """IEEE half precision, rounded to nearest even."""

    name = "f16"
    label = "16-bit"
    ggml_type = 1
    block_size = 1
    block_bytes = 2

    def pack(self, weights: FloatArray) -> ByteArray:
        require_below(self, weights, 65520.0)  # 65504 is the largest; ties round to infinity
        return np.ascontiguousarray(weights, dtype="<f2").view(np.uint8)

    def unpack(self, packed: ByteArray, width: int) -> FloatArray:
        check_row_bytes(self, packed, width)
        return np.ascontiguousarray(packed).view("<f2").astype(np.float32)


@register
class BF16(Form):
    """The upper half of a float32, rounded to nearest even."""

    name = "bf16"
    label = "16-bit"
    ggml_type = 30
    block_size = 1
    block_bytes = 2

    def pack(self, weights: FloatArray) -> ByteArray:
        require_below(self, weights, float.fromhex("0x1.ffp127"))
        bits = np.ascontiguousarray(weights, dtype="<f4").view("<u4")
        is_odd = (bits >> 16) & 1
        packed: ByteArray = ((bits + 0x7FFF + is_odd) >> 16).astype("<u2").view(np.uint8)
        return packed

    def unpack(self, packed: ByteArray, width: int) -> FloatArray:
        check_row_bytes(self, packed, width)
        bits = np.ascontiguousarray(packed).view("<u2").astype(np.uint32)
        return (bits << 16).view(np.float32)
