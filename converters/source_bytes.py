"""Reading byte ranges of a checkpoint in chunks, checked for NaN without a conversion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from io import FileIO

import numpy as np

from edge_moe.errors import CheckpointError
from edge_moe.packed_tensors import PackedInfo
from edge_moe.tensor_info import FloatArray, TensorInfo, to_float32

CHUNK_BYTES = 8 * 2**20
# dtype -> (unsigned integer of the same width, exponent bits: all ones in NaN and infinity)
_EXPONENTS: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
}


def read_chunks(info: TensorInfo) -> Iterator[bytes]:
    """The stored bytes of `info`, at most `CHUNK_BYTES` at a time.

    Raises:
        CheckpointError: the file ends early, or a float tensor holds NaN or infinity.
    """
    if isinstance(info, PackedInfo):
        yield from info.chunks()
        return
    with info.path.open("rb", buffering=0) as handle:
        handle.seek(info.offset)
        remaining_bytes = info.num_bytes
        while remaining_bytes:
            chunk = _read_exactly(handle, min(CHUNK_BYTES, remaining_bytes), info)
            _check_finite(chunk, info)
            remaining_bytes -= len(chunk)
            yield chunk


def read_all(infos: Iterable[TensorInfo]) -> Iterator[bytes]:
    """The chunks of several ranges, one after the other."""
    for info in infos:
        yield from read_chunks(info)


def read_float32(info: TensorInfo) -> FloatArray:
    """`info` as float32. Memory: its bytes in its own dtype plus the result."""
    return to_float32(b"".join(read_chunks(info)), info.dtype).reshape(info.shape)


def rows(info: TensorInfo, row_ids: Sequence[int]) -> tuple[TensorInfo, ...]:
    """The ranges of `info[row_id]` for every row id; `info` has at least one axis."""
    return tuple(info.row(row_id) for row_id in row_ids)


def _read_exactly(handle: FileIO, num_bytes: int, info: TensorInfo) -> bytes:
    pieces: list[bytes] = []
    missing_bytes = num_bytes
    while missing_bytes:  # a raw read may return less than asked
        piece = handle.read(missing_bytes)
        if not piece:
            raise CheckpointError(
                f"{info.path} ended inside {info.name!r}: it was truncated while being read; "
                "download the file again"
            )
        pieces.append(piece)
        missing_bytes -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _check_finite(chunk: bytes, info: TensorInfo) -> None:
    if info.dtype not in _EXPONENTS:
        return
    unsigned, mask = _EXPONENTS[info.dtype]
    bits = np.frombuffer(chunk, dtype=unsigned)
    if ((bits & unsigned(mask)) == mask).any():
        raise CheckpointError(
            f"{info.path}: {info.name!r} holds NaN or infinity: the checkpoint is damaged, "
            "download it again"
        )
