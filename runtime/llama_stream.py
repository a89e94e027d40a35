"""A GGUF model as a C stream, from which llama.cpp loads everything but the routed experts.

llama.cpp can read a model from an open stream (`llama_model_load_from_file_ptr`), and glibc makes
streams of callbacks (`fopencookie`). The parts of a split model are one file here. Experts are
skipped: no byte of them is read from the disk.
"""

from __future__ import annotations

import ctypes
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_moe.errors import CheckpointError, InputError
from edge_moe.gguf_header import GgufHeader, GgufTensorInfo
from edge_moe.gguf_model import GgufModel
from edge_moe.gguf_raw import RawTensor, header_bytes, offsets
from edge_moe.gguf_split import SPLIT_KEYS

_OPEN = "fopencookie"
_BUFFER_BYTES = 256 * 1024
"""Of the stream: a callback for each."""
_READ = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_SEEK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64), ctypes.c_int
)


class _CookieFunctions(ctypes.Structure):
    """glibc's cookie_io_functions_t."""

    _fields_ = (
        ("read", _READ),
        ("write", ctypes.c_void_p),
        ("seek", _SEEK),
        ("close", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Piece:
    """A run of the stream's bytes, and where they are."""

    start: int
    end: int
    source: Path | bytes | None
    """A file, the bytes themselves, or nothing: what nobody looks at."""
    offset: int = 0
    """In the file."""


def model_pieces(model: GgufModel, skipped: Collection[str]) -> list[Piece]:
    """The whole of `model` as one file, without the tensors named in `skipped`."""
    if len(model.parts) == 1:
        return _file_pieces(model.header, model.path, skipped)
    return _merged_pieces(model, skipped)


def _file_pieces(header: GgufHeader, path: Path, skipped: Collection[str]) -> list[Piece]:
    """The file as it is; what lies between skipped tensors is read with the tensor before it."""
    pieces, at = [], 0
    for info in sorted(header.tensors, key=lambda each: each.offset):
        if info.name not in skipped:
            continue
        if at < info.offset:
            pieces.append(Piece(at, info.offset, path, at))
        at = info.offset + info.num_bytes
        pieces.append(Piece(info.offset, at, None))
    if at < header.total_bytes:
        pieces.append(Piece(at, header.total_bytes, path, at))
    return pieces


def _merged_pieces(model: GgufModel, skipped: Collection[str]) -> list[Piece]:
    """A header without the keys of a split model, then all tensors."""
    infos = list(model.tensors.values())
    keys = [model.header.raw_key(key) for key in model.header.key_spans if key not in SPLIT_KEYS]
    raw = [RawTensor(info.name, info.shape, info.type_name) for info in infos]
    alignment = model.header.alignment
    header = header_bytes(keys, raw, alignment)
    pieces = [Piece(0, len(header), header)]
    *starts, data_bytes = (len(header) + start for start in offsets(raw, alignment))
    for info, start, following in zip(infos, starts, [*starts[1:], data_bytes], strict=True):
        pieces.append(_tensor_piece(info, start, skipped))
        if start + info.num_bytes < following:
            pieces.append(Piece(start + info.num_bytes, following, None))
    return pieces


def _tensor_piece(info: GgufTensorInfo, start: int, skipped: Collection[str]) -> Piece:
    source = None if info.name in skipped else info.path
    return Piece(start, start + info.num_bytes, source, info.offset)


class ModelStream:
    """Reads pieces into memory at an address. What fails is kept in `error`."""

    def __init__(self, pieces: list[Piece], on_skipped: Callable[[int], None]) -> None:
        """`on_skipped` is told bytes whose place in memory was written with nothing of worth."""
        self._pieces = pieces
        self._starts = [piece.start for piece in pieces]
        self._on_skipped = on_skipped
        self._files = {
            piece.source: os.open(piece.source, os.O_RDONLY)
            for piece in pieces
            if isinstance(piece.source, Path)
        }
        self._position = 0
        self.total_bytes = pieces[-1].end
        self.error: BaseException | None = None

    def read(self, address: int, num_bytes: int) -> int:
        """Bytes that were put at `address`, from where the last call ended."""
        wanted = min(num_bytes, self.total_bytes - self._position)
        done = 0
        while done < wanted:
            piece = self._pieces[bisect_right(self._starts, self._position) - 1]
            count = min(wanted - done, piece.end - self._position)
            count = self._copy(piece, self._position - piece.start, address + done, count)
            done += count
            self._position += count
        return done

    def seek(self, offset: int, whence: int) -> int:
        """The new position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.total_bytes}[whence]
        self._position = min(max(base + offset, 0), self.total_bytes)
        return self._position

    def close(self) -> None:
        for descriptor in self._files.values():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        self._files = {}

    def _copy(self, piece: Piece, start: int, address: int, num_bytes: int) -> int:
        if piece.source is None:
            self._on_skipped(num_bytes)
            return num_bytes
        if isinstance(piece.source, bytes):
            ctypes.memmove(address, piece.source[start : start + num_bytes], num_bytes)
            return num_bytes
        target = (ctypes.c_char * num_bytes).from_address(address)
        count = os.preadv(self._files[piece.source], [target], piece.offset + start)
        if count == 0:
            raise CheckpointError(
                f"{piece.source} ended early: it was truncated while being read; download it again"
            )
        return count


def require_callback_streams() -> None:
    """Raise `InputError` where the C library makes no streams of callbacks: only glibc does."""
    if not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), _OPEN):
        raise InputError(
            "paging the experts of a GGUF file takes glibc's fopencookie, which this system lacks: "
            "run it on Linux, or with llama.cpp itself"
        )


@contextmanager
def c_stream(stream: ModelStream) -> Iterator[int]:
    """`stream` as a FILE pointer.

    Raises:
        InputError: this C library makes no streams of callbacks.
    """
    require_callback_streams()
    libc: Any = ctypes.CDLL(None)
    libc.fopencookie.argtypes = [ctypes.c_void_p, ctypes.c_char_p, _CookieFunctions]
    libc.fopencookie.restype = ctypes.c_void_p
    libc.fclose.argtypes = [ctypes.c_void_p]
    libc.setvbuf.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

    def read(_cookie: int, address: int, num_bytes: int) -> int:
        try:
            return stream.read(address, num_bytes)
        except BaseException as error:  # must not unwind through C
            stream.error = error
            return -1

    def seek(_cookie: int, offset: Any, whence: int) -> int:
        offset[0] = stream.seek(offset[0], whence)
        return 0

    functions = _CookieFunctions(_READ(read), None, _SEEK(seek), None)
    buffer = ctypes.create_string_buffer(_BUFFER_BYTES)
    file = libc.fopencookie(None, b"rb", functions)
    if not file:
        raise MemoryError("fopencookie")
    try:
        libc.setvbuf(file, buffer, 0, _BUFFER_BYTES)
        yield file
    finally:
        libc.fclose(file)
        stream.close()
