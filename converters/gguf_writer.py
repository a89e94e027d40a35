"""The `gguf` package, imported on demand and made to stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedWriter
from types import ModuleType
from typing import Any

import numpy as np

from edge_moe.converters.copy_range import write_all
from edge_moe.errors import MissingExtraError, TargetError
from edge_moe.formats import get_form

Chunks = Callable[[], Iterator[bytes]]


@dataclass(frozen=True)
class GgufTensor:
    """One tensor to be written: its place in the header, and where its bytes come from."""

    name: str
    shape: tuple[int, ...]
    """In weights, slowest axis first (GGUF stores it reversed)."""
    form: str
    chunks: Chunks

    @property
    def byte_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], get_form(self.form).row_bytes(self.shape[-1]))

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.byte_shape, dtype=np.int64))


class _Streamed:
    """Stands in for a numpy array in `GGUFWriter.write_tensor_data`, which uses only these two."""

    def __init__(self, tensor: GgufTensor) -> None:
        self._chunks = tensor.chunks
        self.nbytes = tensor.num_bytes

    def tofile(self, handle: BufferedWriter) -> None:
        written_bytes = sum(handle.write(chunk) for chunk in self._chunks())
        if written_bytes != self.nbytes:
            raise RuntimeError(f"a tensor of {self.nbytes} bytes wrote {written_bytes}")


def import_gguf() -> ModuleType:
    """The `gguf` package.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "writing GGUF files") from None
    return gguf


def add_tensor_info(writer: Any, tensor: GgufTensor) -> None:
    """Announce `tensor` in the header."""
    writer.add_tensor_info(
        tensor.name,
        tensor.byte_shape,
        np.dtype(np.uint8),
        tensor.num_bytes,
        raw_dtype=_ggml_type(tensor.form),
    )


def write_tensor(writer: Any, tensor: GgufTensor) -> None:
    """Write the bytes of `tensor`, which must be the next one announced. Memory: one chunk."""
    writer.write_tensor_data(_Streamed(tensor))


def write_tensor_at(fd: int, tensor: GgufTensor, offset: int) -> None:
    """Write the bytes of `tensor` at `offset` of an open file. Memory: one chunk."""
    end = offset
    for chunk in tensor.chunks():
        write_all(fd, chunk, end)
        end += len(chunk)
    if end - offset != tensor.num_bytes:
        raise RuntimeError(f"{tensor.name} of {tensor.num_bytes} bytes wrote {end - offset}")


def _ggml_type(form_name: str) -> Any:
    """The package's enum member for a form; types it does not know yet are added to its tables."""
    gguf = import_gguf()
    form = get_form(form_name)
    types = gguf.GGMLQuantizationType
    if form.ggml_type is None:
        raise TargetError(f"target gguf: ggml does not know form {form_name}: plan again for gguf")
    if form.ggml_type not in types._value2member_map_:  # q2_0 (42), in gguf up to 0.19
        member = int.__new__(types, form.ggml_type)
        member._name_, member._value_ = form_name.upper(), form.ggml_type
        types._member_map_[member._name_] = member
        types._value2member_map_[form.ggml_type] = member
        types._member_names_.append(member._name_)
        gguf.GGML_QUANT_SIZES[member] = (form.block_size, form.block_bytes)
    return types(form.ggml_type)
