"""Experts of another store as llama.cpp's fastest CPU kernels want them, rearranged while read.

A record keeps its size, and of its matrices those that have no such kernels keep their bytes.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable

import numpy as np

from edge_moe.budget import reading_threads
from edge_moe.plan import MemoryTerm
from edge_moe.runtime.expert_matrices import ExpertMatrix, expert_matrices
from edge_moe.runtime.expert_store import ExpertStore, RecordInfo
from edge_moe.runtime.llama_api import TensorHead
from edge_moe.runtime.llama_rearrange import rearranged_kernels
from edge_moe.runtime.policy import Key
from edge_moe.spec import ModelSpec

TERM_NAME = "rearranging"
"""The line of the memory bill."""


class RearrangedStore(ExpertStore):
    """The same keys and records as the store below, which has no task delta in it."""

    def __init__(self, store: ExpertStore, spec: ModelSpec, forms: Iterable[str]) -> None:
        """`forms` are those that libggml computes: others are left as they are.

        Raises:
            MissingExtraError: llama-cpp-python is not installed.
        """
        self._store = store
        self.kept, self.unpacks = store.kept, store.unpacks
        self._num_threads = reading_threads(spec)
        matrices = {form: [_adopted(one) for one in expert_matrices(form, spec)] for form in forms}
        self._matrices = {
            form: found for form, found in matrices.items() if any(head for _, head in found)
        }
        self._local = threading.local()

    @property
    def has_any(self) -> bool:
        """Whether any matrix of any expert is rearranged."""
        return bool(self._matrices)

    def record(self, key: Key) -> RecordInfo:
        return self._store.record(key)

    def read_bytes(self, key: Key) -> int:
        return self._store.read_bytes(key)

    def read_into(self, key: Key, buffer: memoryview) -> None:
        record = self._store.record(key)
        matrices = self._matrices.get(record.form)
        if matrices is None:
            self._store.read_into(key, buffer)
            return
        scratch = self._scratch(record.num_bytes)
        self._store.read_into(key, scratch)
        source, target = (np.frombuffer(memory, np.uint8) for memory in (scratch, buffer))
        for matrix, head in matrices:
            places = slice(matrix.offset_bytes, matrix.offset_bytes + matrix.num_bytes)
            if head is None:
                target[places] = source[places]
                continue
            rearranged_kernels().convert(
                head,
                source.ctypes.data + matrix.offset_bytes,
                target.ctypes.data + matrix.offset_bytes,
                matrix.num_bytes,
            )

    def term(self) -> MemoryTerm:
        """What threads hold that read experts: one as it is stored, each."""
        return MemoryTerm(
            name=TERM_NAME,
            num_bytes=self._num_threads * self._largest_bytes,
            source="headers",
            note=f"experts that {self._num_threads} threads rearrange",
        )

    def close(self) -> None:
        self._store.close()

    @property
    def _largest_bytes(self) -> int:
        records = map(self._store.record, self.keys())
        return max((one.num_bytes for one in records if one.form in self._matrices), default=0)

    def _scratch(self, num_bytes: int) -> memoryview:
        """This thread's own."""
        memory: mmap.mmap | None = getattr(self._local, "memory", None)
        if memory is None:
            memory = self._local.memory = mmap.mmap(-1, self._largest_bytes)
        return memoryview(memory)[:num_bytes]


def is_rearranged(matrix: ExpertMatrix) -> bool:
    """Whether llama.cpp has faster kernels on this CPU for it, if it is rearranged."""
    return _adopted(matrix)[1] is not None


def _adopted(matrix: ExpertMatrix) -> tuple[ExpertMatrix, TensorHead | None]:
    return matrix, rearranged_kernels().matrix(matrix.kind, matrix.rows, matrix.width)
