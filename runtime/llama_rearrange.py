"""Experts' matrices as llama.cpp's fastest CPU kernels want them: rows of blocks interleaved.

llama.cpp rearranges matrices of some types while it loads them (its buffer type CPU_REPACK), which
takes as many bytes as before. An expert's rows stay together, so that experts can be rearranged one
by one, and paged as they are.
"""

from __future__ import annotations

import ctypes
from typing import Any

from edge_moe.runtime.llama_api import TensorHead

_NAME = b"CPU_REPACK"
_DEVICE_CPU = 0
_USAGE_WEIGHTS = 1
_ROWS = 16
"""CPUs interleave 1, 4, 8 or 16 rows: so many, or a multiple, can be rearranged alone."""
_GET_TYPES = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)


class Rearranger:
    """Turns experts' matrices over to llama.cpp's kernels for rearranged ones."""

    def __init__(self, llama: Any) -> None:
        """`llama` is llama-cpp-python's module of C functions.

        Its library's own dependencies are used: another copy of libggml-cpu, which ctypes may have
        loaded by its path, has other buffer types.
        """
        ggml = llama._lib
        self._ggml = ggml
        _declare(ggml)
        kind = _buffer_type(ggml)
        self._buffer = None if kind is None else ggml.ggml_backend_buft_alloc_buffer(kind, 64)
        if self._buffer:
            ggml.ggml_backend_buffer_set_usage(self._buffer, _USAGE_WEIGHTS)
        self._matrices: dict[str, bytes] = {}
        """The ggml_tensor of those that were adopted."""

    @property
    def names(self) -> frozenset[str]:
        """The tensors that are computed as rearranged."""
        return frozenset(self._matrices)

    def adopt(self, name: str, tensor: int) -> bool:
        """From now on the tensor at this address is computed as rearranged.

        False, and nothing done, where its type has no such kernels on this CPU. Comes before the
        context is made.
        """
        fields = TensorHead.from_address(tensor)
        if not self._buffer or fields.ne[1] % _ROWS:
            return False
        before, fields.buffer = fields.buffer, self._buffer
        self._ggml.ggml_backend_buffer_init_tensor(self._buffer, tensor)
        if not fields.extra:
            fields.buffer = before
            return False
        self._matrices[name] = ctypes.string_at(tensor, ctypes.sizeof(TensorHead))
        return True

    def row_bytes(self, name: str) -> int:
        """Of `_ROWS` rows, the least that `convert` takes."""
        return _ROWS * int(TensorHead.from_buffer_copy(self._matrices[name]).nb[1])

    def convert(self, name: str, source: int, target: int, num_bytes: int) -> None:
        """Rearrange whole rows of the tensor `name` from one address to another.

        `num_bytes` are a multiple of `row_bytes`; the interpreter's lock is free meanwhile.
        """
        fields = TensorHead.from_buffer_copy(self._matrices[name])
        rows = num_bytes // fields.nb[1]
        fields.ne[1:] = [rows, 1, 1]
        fields.nb[2:] = [num_bytes, num_bytes]
        fields.data = target
        self._ggml.ggml_backend_tensor_set(ctypes.addressof(fields), source, 0, num_bytes)

    def close(self) -> None:
        """Free what is held. Nothing may compute with what was adopted afterwards."""
        if self._buffer:
            self._ggml.ggml_backend_buffer_free(self._buffer)
        self._buffer = None


def _buffer_type(ggml: Any) -> int | None:
    """llama.cpp's buffer type of rearranged matrices; None where it was built without."""
    device = ggml.ggml_backend_dev_by_type(_DEVICE_CPU)
    registry = ggml.ggml_backend_dev_backend_reg(device)
    function = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not function:
        return None
    found = _GET_TYPES(function)(device)
    index = 0
    while found and found[index]:
        if ggml.ggml_backend_buft_name(found[index]) == _NAME:
            return int(found[index] or 0)
        index += 1
    return None


def _declare(ggml: Any) -> None:
    """The functions' types; ctypes would cut pointers to 32 bits."""
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, result, arguments in (
        ("ggml_backend_reg_get_proc_address", pointer, [pointer, ctypes.c_char_p]),
        ("ggml_backend_dev_by_type", pointer, [ctypes.c_int]),
        ("ggml_backend_dev_backend_reg", pointer, [pointer]),
        ("ggml_backend_buft_name", ctypes.c_char_p, [pointer]),
        ("ggml_backend_buft_alloc_buffer", pointer, [pointer, size]),
        ("ggml_backend_buffer_init_tensor", ctypes.c_int, [pointer, pointer]),
        ("ggml_backend_buffer_set_usage", None, [pointer, ctypes.c_int]),
        ("ggml_backend_buffer_free", None, [pointer]),
        ("ggml_backend_tensor_set", None, [pointer, pointer, size, size]),
    ):
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, arguments
