"""ggml's own quantisers, from the C library that llama-cpp-python brings (extra `gguf`)."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np

from edge_moe.errors import FormError, MissingExtraError
from edge_moe.formats.base import ByteArray, FloatArray, Form
from edge_moe.formats.ggml_types import GgmlType

_NAMES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
_CPU_NAMES = ("libggml-cpu.so", "libggml-cpu.dylib", "ggml-cpu.dll")


def quantize_chunk(
    form: Form | GgmlType, weights: FloatArray, importance: FloatArray | None
) -> ByteArray:
    """`weights` [rows, width] float32 packed by `ggml_quantize_chunk`: [rows, row_bytes] uint8.

    `importance` [width] weighs the squared error of every column, alike in all rows; ggml's types
    without such a search (q8_0, tq1_0, tq2_0) ignore it. The interpreter's lock is free meanwhile.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        FormError: shapes that do not fit, or numbers that are not finite.
    """
    rows, width = weights.shape
    row_bytes = form.row_bytes(width)
    _require_finite(form, "a weight", weights)
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    if importance is not None:
        if importance.shape != (width,):
            raise FormError(
                f"form {form.name}: the importance of {width} columns has shape "
                f"{importance.shape}: give one number per column"
            )
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        _require_finite(form, "an importance", importance)
    packed = np.empty((rows, row_bytes), dtype=np.uint8)
    written = _library().ggml_quantize_chunk(
        form.ggml_type,
        weights.ctypes.data,
        packed.ctypes.data,
        0,
        rows,
        width,
        None if importance is None else importance.ctypes.data,
    )
    if written != packed.nbytes:
        raise FormError(
            f"libggml packed {rows} rows of {width} as {form.name} into {written} bytes, "
            f"{packed.nbytes} were expected: install the version of the extra gguf"
        )
    return packed


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


def to_float(kind: GgmlType, packed: ByteArray, num_weights: int) -> FloatArray:
    """`packed`, whole blocks of `kind`, as float32 [num_weights] by ggml's own `to_float`.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        FormError: the library does not know the type, or another version of it.
    """
    if packed.nbytes != kind.row_bytes(num_weights):
        raise FormError(f"{num_weights} weights of {kind.name} do not take {packed.nbytes} bytes")
    traits = _library().ggml_get_type_traits(kind.ggml_type).contents
    if (traits.blck_size, traits.type_size) != (kind.block_size, kind.block_bytes):
        raise FormError(
            f"libggml's blocks of {kind.name} are {traits.blck_size} weights in "
            f"{traits.type_size} bytes, expected {kind.block_size} in {kind.block_bytes}: install "
            "the version of the extra gguf"
        )
    if not traits.to_float:
        raise FormError(f"libggml cannot turn {kind.name} into floats: these are no weights")
    packed = np.ascontiguousarray(packed)
    values = np.empty(num_weights, np.float32)
    _ToFloat(traits.to_float)(packed.ctypes.data, values.ctypes.data, num_weights)
    return values


def is_installed() -> bool:
    """Whether the library is there."""
    return _path() is not None


def library() -> ctypes.CDLL:
    """The loaded library: the same one that llama.cpp uses.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
    """
    return _library()


@cache
def cpu_library() -> ctypes.CDLL:
    """The loaded library of the CPU kernels.

    Raises:
        MissingExtraError: llama-cpp-python is not installed, or loads its CPU kernels by itself.
    """
    path = _path(_CPU_NAMES)
    if path is None:
        raise MissingExtraError("llama-cpp-python", "gguf", "computing packed experts by libggml")
    return ctypes.CDLL(str(path))


def has_cpu_library() -> bool:
    """Whether the library of the CPU kernels is there."""
    return _path(_CPU_NAMES) is not None


def _path(names: tuple[str, ...] = _NAMES) -> Path | None:
    """A library beside the package `llama_cpp`, found without importing it."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        return None
    folders = (Path(found.origin).parent / name for name in ("lib", "bin"))
    paths = (folder / name for folder in folders for name in names)
    return next((path for path in paths if path.is_file()), None)


@cache
def _library() -> ctypes.CDLL:
    path = _path()
    if path is None:
        raise MissingExtraError("llama-cpp-python", "gguf", "packing by libggml")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return library


def _require_finite(form: Form | GgmlType, what: str, values: FloatArray) -> None:
    if not np.isfinite(values).all():
        raise FormError(f"form {form.name}: {what} is NaN or infinite; the input is damaged")
