"""Headers of safetensors files, checked against the size of the file.

Layout: 8 bytes little-endian header length N, N bytes of JSON
{"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}, then the data;
offsets count from the end of the header.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edge_moe.errors import CheckpointError
from edge_moe.files import os_problem
from edge_moe.tensor_info import TensorInfo

ITEMSIZE_BYTES = {
    **{"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1},
    **{"U8": 1, "I8": 1, "I32": 4, "I64": 8},
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """(tensors by name, metadata) of one safetensors file, fully checked against the file's size.

    Raises:
        CheckpointError: missing, truncated, or a header that contradicts itself.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as handle:
            header_bytes = header_length(handle.read(8), file_bytes, path)
            header = json.loads(handle.read(header_bytes))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: download the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {os_problem(error)}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise CheckpointError(
            f"{path} has no readable header ({error}): download the file again"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object: download the file again")
    metadata = header.pop("__metadata__", {})
    if not _is_text_table(metadata):
        raise CheckpointError(
            f"{path}: the header's __metadata__ is not a table of texts: download the file again"
        )
    data_start = 8 + header_bytes
    tensors = {
        name: _tensor_info(name, entry, path, data_start, file_bytes)
        for name, entry in header.items()
    }
    _check_overlaps(tensors.values(), path)
    return tensors, metadata


def _is_text_table(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _check_overlaps(tensors: Iterable[TensorInfo], path: Path) -> None:
    end, last = 0, ""
    for info in sorted(tensors, key=lambda info: (info.offset, info.num_bytes)):
        if info.offset < end:
            raise CheckpointError(
                f"{path}: {info.name!r} lies inside {last!r} (byte {info.offset}): "
                "download the file again"
            )
        end, last = info.offset + info.num_bytes, info.name


def data_start(path: Path) -> int:
    """First byte of a file's data, which offsets in its JSON count from.

    `TensorInfo.offset` counts from the start of the file.

    Raises:
        CheckpointError: no such header.
        OSError: it cannot be read.
    """
    with path.open("rb") as handle:
        return 8 + header_length(handle.read(8), path.stat().st_size, path)


def header_length(prefix: bytes, file_bytes: int, path: Path) -> int:
    """Bytes of the JSON, as the first eight of the file state.

    Raises:
        CheckpointError: they are not there, or state more than the file holds.
    """
    if len(prefix) < 8:
        raise CheckpointError(
            f"{path} is truncated: {file_bytes} bytes hold no header; download the file again"
        )
    length: int = struct.unpack("<Q", prefix)[0]
    if length > _MAX_HEADER_BYTES or 8 + length > file_bytes:
        raise CheckpointError(
            f"{path} is truncated or not safetensors: it states a header of {length} bytes "
            f"in a file of {file_bytes}; download the file again"
        )
    return length


def _tensor_info(name: str, entry: Any, path: Path, data_start: int, file_bytes: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not isinstance(dtype, str) or not all(type(n) is int for n in (*shape, begin, end)):
            raise TypeError
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{path}: the header entry of {name!r} is malformed: download the file again"
        ) from None
    if begin < 0 or end < begin or min(shape, default=0) < 0:
        raise CheckpointError(
            f"{path}: {name!r} has an impossible range {begin}..{end}: download the file again"
        )
    if data_start + end > file_bytes:
        raise CheckpointError(
            f"{path} is truncated: {name!r} ends at byte {data_start + end} "
            f"but the file has {file_bytes}; download the file again"
        )
    itemsize_bytes = ITEMSIZE_BYTES.get(dtype)
    expected_bytes = math.prod(shape) * (itemsize_bytes or 0)
    if itemsize_bytes is not None and expected_bytes != end - begin:
        raise CheckpointError(
            f"{path}: {name!r} of shape {list(shape)} {dtype} needs {expected_bytes} bytes, "
            f"the header gives it {end - begin}: download the file again"
        )
    return TensorInfo(name, path, dtype, shape, data_start + begin, end - begin)
