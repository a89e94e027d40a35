"""Experts of another store with a task delta: in their weights where those are floats, else beside.

bf16, f16 and f32 weights are added to in float32 and rounded to what they are stored in. Quantised
experts keep their bytes, and their records grow by a `DeltaTail`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edge_moe.budget import reading_threads
from edge_moe.delta_file import DeltaFile
from edge_moe.delta_layout import DeltaTensor, split_packed, unpack_tensor
from edge_moe.errors import DeltaError, FormError, InputError
from edge_moe.formats import expert_packed_bytes, get_form, split_form
from edge_moe.plan import MemoryTerm
from edge_moe.runtime.delta_tail import ByteArray, DeltaTail, is_plain, tail_of
from edge_moe.runtime.expert_store import ExpertStore, RecordFiles, RecordInfo
from edge_moe.runtime.kernel_choice import Kernels
from edge_moe.runtime.policy import Key
from edge_moe.sparse_signs import MOST_LENGTH, unpacking_bytes
from edge_moe.spec import ModelSpec
from edge_moe.tensor_info import FloatArray
from edge_moe.units import format_bytes

if TYPE_CHECKING:
    from edge_moe.runtime.residency import PagingOptions

TERM_NAME = "task delta"
"""The line of the memory bill."""
_WORDS = {"bf16": "<u2", "f16": "<u2", "f32": "<u4"}


class DeltaStore(ExpertStore):
    """The same keys as the store below; what `read_into` gives has the delta in it."""

    def __init__(self, store: ExpertStore, delta: DeltaFile, spec: ModelSpec) -> None:
        """`delta` belongs to the model: see `open_delta`.

        Raises:
            DeltaError: rows that are too wide for a delta beside them.
        """
        self._store = store
        self.delta = delta
        self._shape = spec.expert_shape
        self._layer_ids = spec.moe_layer_ids
        self._num_threads = reading_threads(spec)
        self._files = RecordFiles(is_aligned=False)
        self.kept, self.unpacks = store.kept, store.unpacks
        self.tail = None if all(map(is_plain, store.all_forms())) else DeltaTail.of(delta)

    def record(self, key: Key) -> RecordInfo:
        below = self._store.record(key)
        tail = tail_of(self.tail, below.form)
        return below if tail is None else RecordInfo(below.form, below.num_bytes + tail.num_bytes)

    def read_bytes(self, key: Key) -> int:
        """Packed weights and packed signs."""
        signs = sum(tensor.num_bytes for tensor in self._tensors(key))
        return self._store.read_bytes(key) + signs

    def read_into(self, key: Key, buffer: memoryview) -> None:
        below = self._store.record(key)
        self._store.read_into(key, buffer[: below.num_bytes])
        tensors = self._tensors(key)
        raw = memoryview(bytearray(sum(tensor.num_bytes for tensor in tensors)))
        if len(raw):
            self._files.read(self.delta.path, tensors[0].offset, raw)
        layer, expert = self._layer_ids[key[0]], self.kept[key[0]][key[1]]
        what = f"delta {self.delta.path}: layer {layer} expert {expert}"
        record = np.frombuffer(buffer, np.uint8)
        tail = tail_of(self.tail, below.form)
        if tail is None:
            self._add(record, below.form, tensors, raw, what)
        else:
            tail.write(record[below.num_bytes :], tensors, raw, what)

    def term(self) -> MemoryTerm:
        """What the delta takes in memory: tables, and what is unpacked while experts are read."""
        num_kept = min(max(self.delta.most_kept()), MOST_LENGTH)
        length = min(
            max(rows * width for rows, width in self.delta.info.expert_shapes), MOST_LENGTH
        )
        per_thread = self.delta.most_expert_bytes() + unpacking_bytes(num_kept, length)
        note = f"tables, and signs that {self._num_threads} threads unpack"
        if self.tail is not None:
            beside = format_bytes(self.tail.num_bytes)
            note += f"; beside it {beside} in the slot of every quantised expert"
        num_bytes = self.delta.table_bytes + self._num_threads * per_thread
        return MemoryTerm(name=TERM_NAME, num_bytes=num_bytes, source="headers", note=note)

    def close(self) -> None:
        self._files.close()
        self._store.close()

    def _tensors(self, key: Key) -> tuple[DeltaTensor, ...]:
        return self.delta.expert(self._layer_ids[key[0]], self.kept[key[0]][key[1]])

    def _add(
        self,
        record: ByteArray,
        form: str,
        tensors: Sequence[DeltaTensor],
        raw: memoryview,
        what: str,
    ) -> None:
        """Change the floats of `record`, which are rows of matrices one after the other."""
        sizes = expert_packed_bytes(form, *self._shape)
        parts = zip(split_form(form), sizes, strict=True)
        matrices = [(part, size) for part, size in parts if size]  # no gate_proj takes no bytes
        start = 0
        pieces = split_packed(tensors, raw)
        for (part, size), (tensor, piece) in zip(matrices, pieces, strict=True):
            words = record[start : start + size].view(_WORDS[part])
            for places, is_negative in unpack_tensor(tensor, piece, what):
                values = get_form(part).unpack(words[places].view(np.uint8), len(places))
                values += tensor.signed(is_negative)
                words[places] = _packed(part, values, what)
            start += size


def _packed(part: str, values: FloatArray, what: str) -> npt.NDArray[np.unsignedinteger]:
    """[k] words"""
    try:
        return get_form(part).pack(values).view(_WORDS[part])
    except FormError as error:
        raise DeltaError(f"{what}: {error}") from None


def kernels_beside(store: DeltaStore, options: PagingOptions) -> Kernels:
    """Whose kernels compute the experts of `store`, for Triton's know nothing of a delta.

    Raises:
        InputError: kernels or shadows that cannot be used with it.
    """
    if options.stall.uses_shadows:
        raise InputError(
            f"--stall {options.stall.mode} computes experts from shadows, which --delta does not "
            "change: leave one of the two out"
        )
    kernels = options.kernels
    if store.tail is None or (kernels != "triton" and options.device.type == "cpu"):
        return kernels
    if kernels == "triton":
        raise InputError(
            "Triton's kernels cannot add --delta to quantised experts: use --kernels exact, or a "
            "package of 16-bit experts"
        )
    return "exact"


def open_delta(path: Path, fingerprint: str, spec: ModelSpec) -> DeltaFile:
    """The delta at `path`, which must belong to the checkpoint with this fingerprint.

    Raises:
        DeltaError: damaged, or made for another model.
    """
    delta = DeltaFile(path)
    delta.require_base(fingerprint)
    found = delta.info.moe_layer_ids, delta.info.num_experts, delta.info.expert_shapes
    if found != (spec.moe_layer_ids, spec.num_experts, spec.expert_matrix_shapes):
        raise DeltaError(
            f"delta {path} is damaged (its experts are not those of its base): make it again with "
            "`edge-moe delta`"
        )
    return delta
