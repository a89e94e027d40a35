"""The C functions of llama-cpp-python's two libraries that watching a graph takes."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_moe.errors import CheckpointError, InputError, MissingExtraError
from edge_moe.formats import ggml_library

SPIN_COUNT = "3000"
TESTED_VERSION = "0.3.36"
"""Of llama-cpp-python."""
_FIELDS = {
    "llama_model_params": (
        "n_gpu_layers",
        "load_mode",
        "no_alloc",
        "tensor_buft_overrides",
        "use_extra_bufts",
        "kv_overrides",
    ),
    "llama_context_params": (
        "n_ctx",
        "n_batch",
        "n_ubatch",
        "n_seq_max",
        "n_threads",
        "n_threads_batch",
        "flash_attn_type",
        "type_k",
        "type_v",
        "cb_eval",
        "op_offload",
        "swa_full",
    ),
    "llama_model_kv_override": ("tag", "key", "value"),
    "llama_batch": ("n_tokens", "token", "pos", "n_seq_id", "seq_id", "logits"),
}
"""Fields of C structures that are set: ctypes would take any other name without a word."""
_FUNCTIONS = (
    "ggml_backend_sched_eval_callback",
    "llama_get_memory",
    "llama_init_from_model",
    "llama_memory_clear",
    "llama_memory_seq_rm",
    "llama_model_load_from_file",
    "llama_model_load_from_file_ptr",
)


class TensorHead(ctypes.Structure):
    """ggml_tensor, whose name takes GGML_MAX_NAME = 64 bytes."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


_TYPE_F32 = 0
_SOURCES_OFFSET = TensorHead.src.offset
_NAME_OFFSET = TensorHead.name.offset
BEGINNING_BYTES = 8
"""Of a name, that `LlamaApi.beginning` gives."""


class LlamaApi:
    """The C functions that are used, of llama-cpp-python's two libraries."""

    def __init__(self, llama: Any) -> None:
        self.llama = llama
        ggml = ggml_library.library()
        ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
        ggml.ggml_get_name.restype = ctypes.c_char_p
        ggml.ggml_nbytes.argtypes = [ctypes.c_void_p]
        ggml.ggml_nbytes.restype = ctypes.c_size_t
        ggml.ggml_get_data.argtypes = [ctypes.c_void_p]
        ggml.ggml_get_data.restype = ctypes.c_void_p
        ggml.ggml_backend_buffer_is_host.argtypes = [ctypes.c_void_p]
        ggml.ggml_backend_buffer_is_host.restype = ctypes.c_bool
        for function in (ggml.ggml_backend_tensor_get, ggml.ggml_backend_tensor_set):
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
            function.restype = None
        self._ggml = ggml
        self._hosts: dict[int | None, bool] = {}

    def name(self, tensor: int) -> str:
        found: bytes = self._ggml.ggml_get_name(tensor)
        return found.decode(errors="replace")

    def beginning(self, tensor: int) -> int:
        """The first bytes of a tensor's name as a number: in a fifth of the time of `name`."""
        found: int = ctypes.c_uint64.from_address(tensor + _NAME_OFFSET).value
        return found

    def require_known_layout(self, tensor: int) -> None:
        """Raise `InputError` where ggml_tensor is not `TensorHead`."""
        head = TensorHead.from_address(tensor)
        found = head.name.decode(errors="replace"), head.data
        if found != (self.name(tensor), self._ggml.ggml_get_data(tensor)):
            raise InputError(
                "this version of llama-cpp-python keeps tensors in a way that is not known here: "
                f"pip install llama-cpp-python=={TESTED_VERSION}"
            )

    def first_source(self, tensor: int) -> int | None:
        """The tensor that a node is computed from, the first where there are several."""
        return ctypes.c_void_p.from_address(tensor + _SOURCES_OFFSET).value

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

    def strided_int32(self, tensor: int) -> npt.NDArray[np.int32]:
        """A copy of a node [T, k] whose rows lie apart, such as the first k of a ranking."""
        head = TensorHead.from_address(tensor)
        count, rows, stride = head.ne[0], head.ne[1], head.nb[1]
        num_bytes = (rows - 1) * stride + 4 * count if rows else 0
        if self._is_host(head.buffer):
            raw: Any = (ctypes.c_char * num_bytes).from_address(head.data)
        else:
            values = np.empty(num_bytes, np.uint8)
            self._ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, num_bytes)
            raw = values.data
        return np.ndarray((rows, count), np.int32, raw, strides=(stride, 4)).copy()

    def _is_host(self, buffer: int | None) -> bool:
        """Whether a buffer is this process's own memory."""
        found = self._hosts.get(buffer)
        if found is None:
            found = bool(buffer and self._ggml.ggml_backend_buffer_is_host(buffer))
            self._hosts[buffer] = found
        return found

    def row(self, tensor: int, width: int) -> npt.NDArray[np.float32] | None:
        """A copy of the one row of a float32 node [1, width]; None where it is something else."""
        head = TensorHead.from_address(tensor)
        if (head.type, head.ne[0], head.ne[1]) != (_TYPE_F32, width, 1):
            return None
        values = np.empty(width, np.float32)
        self._ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
        return values

    def float32_source(
        self, node: int, name: str, shape: tuple[int, int]
    ) -> npt.NDArray[np.float32] | None:
        """The matrix called `name` among a node's sources, where it lies; None if it is not there
        as float32 of this shape, or not in this process's own memory."""
        ggml = self._ggml
        for source in TensorHead.from_address(node).src:
            if not source or self.name(source) != name:
                continue
            head = TensorHead.from_address(source)
            is_plain = (head.type, head.ne[0], head.ne[1]) == (_TYPE_F32, shape[1], shape[0])
            if not is_plain or not self._is_host(head.buffer):
                return None
            floats = (ctypes.c_float * (shape[0] * shape[1])).from_address(
                ggml.ggml_get_data(source)
            )
            return np.ctypeslib.as_array(floats).reshape(shape)
        return None

    def write(self, tensor: int, values: npt.NDArray[Any]) -> None:
        """Replace what a node holds; same bytes."""
        self._ggml.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)


def calm_threads() -> None:
    """Before llama.cpp is loaded: let its threads spin for some microseconds and then sleep.

    By default libgomp's spin for milliseconds, which stalls everybody on a busy machine. Threads
    that sleep at once are woken for each of a token's 1,500 nodes: 74 ms instead of 55 on an idle
    machine, and no less on a busy one.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def llama_api(path: Path) -> LlamaApi:
    """Import llama-cpp-python, which `path` is to be run with.

    Raises:
        MissingExtraError: it is not installed.
        InputError: another version, which lacks what is used.
    """
    calm_threads()
    try:
        from llama_cpp import llama_cpp
    except ImportError:
        raise MissingExtraError("llama-cpp-python", "gguf", f"running {path}") from None
    require_known(llama_cpp)
    return LlamaApi(llama_cpp)


def require_known(llama: Any) -> None:
    """Refuse a version whose interface is another one; `llama` is the module llama_cpp.llama_cpp.

    Raises:
        InputError: names what is missing, the version that is there, and one that works.
    """
    missing = [name for name in _FUNCTIONS if not hasattr(llama, name)]
    for structure, fields in _FIELDS.items():
        known = {field[0] for field in getattr(getattr(llama, structure, None), "_fields_", ())}
        missing += [f"{structure}.{field}" for field in fields if field not in known]
    if not missing:
        return
    from importlib.metadata import version

    raise InputError(
        f"llama-cpp-python {version('llama-cpp-python')} has no {', '.join(missing)}: calibration "
        f"on llama.cpp needs {TESTED_VERSION}: pip install llama-cpp-python=={TESTED_VERSION}"
    )
