"""The C functions of llama-cpp-python's two libraries that watching a graph takes."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_moe.errors import CheckpointError, MissingExtraError
from edge_moe.formats import ggml_library


class LlamaApi:
    """The C functions that are used, of llama-cpp-python's two libraries."""

    def __init__(self, llama: Any) -> None:
        self.llama = llama
        ggml = ggml_library.library()
        ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
        ggml.ggml_get_name.restype = ctypes.c_char_p
        ggml.ggml_nbytes.argtypes = [ctypes.c_void_p]
        ggml.ggml_nbytes.restype = ctypes.c_size_t
        for function in (ggml.ggml_backend_tensor_get, ggml.ggml_backend_tensor_set):
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
            function.restype = None
        self._ggml = ggml

    def name(self, tensor: int) -> str:
        found: bytes = self._ggml.ggml_get_name(tensor)
        return found.decode(errors="replace")

    def read(
        self, tensor: int, name: str, shape: tuple[int, ...], dtype: type, path: Path
    ) -> npt.NDArray[Any]:
        """A copy of a contiguous node.

        Raises:
            CheckpointError: it has another size.
        """
        values: npt.NDArray[Any] = np.empty(shape, dtype)
        found_bytes = self._ggml.ggml_nbytes(tensor)
        if found_bytes != values.nbytes:
            raise CheckpointError(
                f"{path}: llama.cpp's node {name!r} has {found_bytes} bytes, expected "
                f"{values.nbytes} for {list(shape)}: the file's metadata does not describe it"
            )
        self._ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
        return values

    def write(self, tensor: int, values: npt.NDArray[Any]) -> None:
        """Replace what a node holds; same bytes."""
        self._ggml.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)


def llama_api(path: Path) -> LlamaApi:
    """Import llama-cpp-python, which `path` is to be run with.

    Raises:
        MissingExtraError: it is not installed.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall on a busy machine
    try:
        from llama_cpp import llama_cpp
    except ImportError:
        raise MissingExtraError("llama-cpp-python", "gguf", f"running {path}") from None
    return LlamaApi(llama_cpp)
