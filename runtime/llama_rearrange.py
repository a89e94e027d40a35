"""Experts' matrices as llama.cpp's fastest CPU kernels want them: rows of blocks interleaved.

llama.cpp rearranges matrices of some types while it loads them (its buffer type CPU_REPACK), which
takes as many bytes as before. An expert's rows stay together, so that experts can be rearranged one
by one, and paged as they are.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from edge_moe.formats.ggml_library import cpu_library
from edge_moe.formats.ggml_types import GgmlType
from edge_moe.runtime.llama_api import TensorHead

_NAME = b"CPU_REPACK"
_DEVICE_CPU = 0
_USAGE_WEIGHTS = 1
_ROWS = 16
"""CPUs interleave 1, 4, 8 or 16 rows: so many, or a multiple, can be rearranged alone."""
_P, _I, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_GET_TYPES = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)


class RearrangedKernels:
    """llama.cpp's kernels for rearranged matrices, of one loaded copy of libggml-cpu.

    Each copy has buffer types of its own, and computes what lies in those alone.
    """

    buffer_type: int | None
    """The `ggml_backend_buffer_type_t`; None where it was built without."""

    def __init__(self, ggml: Any, device: int) -> None:
        """`ggml` is a library that depends on that copy; `device` is its CPU."""
        self.buffer_type = _buffer_type(ggml, device)
        self._init_tensor = _function(ggml, "buffer_init_tensor", _I, _P, _P)
        self._set_tensor = _function(ggml, "tensor_set", None, _P, _P, _SIZE, _SIZE)
        self._free = _function(ggml, "buffer_free", None, _P)
        self._buffer: int | None = None
        if self.buffer_type is not None:
            self._buffer = _function(ggml, "buft_alloc_buffer", _P, _P, _SIZE)(self.buffer_type, 64)
        if self._buffer:
            _function(ggml, "buffer_set_usage", None, _P, _I)(self._buffer, _USAGE_WEIGHTS)

    def adopt(self, tensor: int) -> bool:
        """From now on the `ggml_tensor` at this address is computed as rearranged.

        False, and nothing done, where its type has no such kernels on this CPU.
        """
        fields = TensorHead.from_address(tensor)
        if not self._buffer or fields.ne[1] % _ROWS:
            return False
        before, fields.buffer = fields.buffer, self._buffer
        self._init_tensor(self._buffer, tensor)
        if not fields.extra:
            fields.buffer = before
        return bool(fields.extra)

    def matrix(self, kind: GgmlType, rows: int, width: int) -> TensorHead | None:
        """For `convert`: a matrix of no place; None where its type has no kernels on this CPU."""
        row_bytes = kind.row_bytes(width)
        num_bytes = rows * row_bytes
        found = TensorHead(
            type=kind.ggml_type,
            ne=(width, rows, 1, 1),
            nb=(kind.block_bytes, row_bytes, num_bytes, num_bytes),
        )
        return found if self.adopt(ctypes.addressof(found)) else None

    def convert(self, matrix: TensorHead, source: int, target: int, num_bytes: int) -> None:
        """Rearrange whole rows of an adopted matrix from one address to another.

        `num_bytes` are those of 16 rows or a multiple; the interpreter's lock is free meanwhile.
        Any thread may call it.
        """
        fields = TensorHead.from_buffer_copy(matrix)
        fields.ne[1:] = [num_bytes // fields.nb[1], 1, 1]
        fields.nb[2:] = [num_bytes, num_bytes]
        fields.data = target
        self._set_tensor(ctypes.addressof(fields), source, 0, num_bytes)

    def close(self) -> None:
        """Free what is held. Nothing may compute with what was adopted afterwards."""
        if self._buffer:
            self._free(self._buffer)
        self._buffer = None


class Rearranger:
    """Turns a GGUF's tensors over to llama.cpp's kernels for rearranged ones."""

    def __init__(self, llama: Any) -> None:
        """`llama` is llama-cpp-python's module of C functions.

        Its library's own dependencies are used, not what ctypes may have loaded by its path.
        """
        ggml = llama._lib
        device = _function(ggml, "dev_by_type", _P, _I)(_DEVICE_CPU)
        self._kernels = RearrangedKernels(ggml, device)
        self._matrices: dict[str, TensorHead] = {}
        """Those that were adopted."""

    @property
    def names(self) -> frozenset[str]:
        """The tensors that are computed as rearranged."""
        return frozenset(self._matrices)

    def adopt(self, name: str, tensor: int) -> bool:
        """`RearrangedKernels.adopt`; comes before the context is made."""
        if not self._kernels.adopt(tensor):
            return False
        content = ctypes.string_at(tensor, ctypes.sizeof(TensorHead))
        self._matrices[name] = TensorHead.from_buffer_copy(content)
        return True

    def row_bytes(self, name: str) -> int:
        """Of `_ROWS` rows, the least that `convert` takes."""
        return _ROWS * int(self._matrices[name].nb[1])

    def convert(self, name: str, source: int, target: int, num_bytes: int) -> None:
        """`RearrangedKernels.convert` of the tensor `name`."""
        self._kernels.convert(self._matrices[name], source, target, num_bytes)

    def close(self) -> None:
        """Free what is held. Nothing may compute with what was adopted afterwards."""
        self._kernels.close()


@cache
def rearranged_kernels() -> RearrangedKernels:
    """Of the library that `ggml_library.cpu_library` loads, for as long as the process runs.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
    """
    ggml = cpu_library()
    registry = _function(ggml, "cpu_reg", _P)()
    device = _function(ggml, "reg_dev_get", _P, _P, _SIZE)(registry, 0)
    _silence(ggml)
    return RearrangedKernels(ggml, device)


def _silence(ggml: Any) -> None:
    """Keep the log, which has a line for every matrix, from the terminal.

    What is called instead does nothing. A function of Python would need the interpreter's lock.
    """
    function = ggml["ggml_log_set"]
    function.restype, function.argtypes = None, [_P, _P]
    function(ctypes.cast(ggml["ggml_tensor_overhead"], _P), None)


def _buffer_type(ggml: Any, device: int) -> int | None:
    """llama.cpp's buffer type of rearranged matrices; None where it was built without."""
    registry = _function(ggml, "dev_backend_reg", _P, _P)(device)
    find = _function(ggml, "reg_get_proc_address", _P, _P, ctypes.c_char_p)
    function = find(registry, b"ggml_backend_dev_get_extra_bufts")
    if not function:
        return None
    found, name = _GET_TYPES(function)(device), _function(ggml, "buft_name", ctypes.c_char_p, _P)
    index = 0
    while found and found[index]:
        if name(found[index]) == _NAME:
            return int(found[index] or 0)
        index += 1
    return None


def _function(ggml: Any, name: str, result: Any, *arguments: Any) -> Any:
    """`ggml_backend_`... with its types: ctypes would cut pointers to 32 bits.

    An object of its own, since others declare it their way.
    """
    function = ggml[f"ggml_backend_{name}"]
    function.restype, function.argtypes = result, arguments
    return function
