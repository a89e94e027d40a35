"""The disk tier: where packed experts are read from, one record at a time.

`PackageStore` reads a native package with O_DIRECT where the file system has it; `CheckpointStore`
reads an ordinary checkpoint's byte ranges. Neither leaves its reads in the page cache.
"""

from __future__ import annotations

import mmap
import os
import threading
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import CheckpointError, PackageError
from edge_moe.formats import expert_bytes, pack_expert
from edge_moe.package import RECORD_ALIGNMENT_BYTES, ExpertRecord, Package
from edge_moe.runtime.delta_tail import DeltaTail
from edge_moe.runtime.direct_file import open_direct
from edge_moe.runtime.policy import Key

_FORM_OF_DTYPE = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
# form -> (unsigned integer of the same width, exponent bits: all ones in NaN and infinity)
_EXPONENTS = {"bf16": ("<u2", 0x7F80), "f16": ("<u2", 0x7C00), "f32": ("<u4", 0x7F800000)}


@dataclass(frozen=True)
class RecordInfo:
    """One packed expert: gate_proj, up_proj, down_proj one after the other, and the tail if any."""

    form: str
    num_bytes: int


class ExpertStore(ABC):
    """Packed experts by (MoE layer index, router row). Thread-safe."""

    kept: list[list[int]]
    """Per MoE layer, ids of the kept experts in router row order."""
    tail: DeltaTail | None = None
    """Of quantised experts: what a task delta puts behind their packed weights."""
    unpacks: bool = False
    """Whether a thread that reads holds more than a bounce buffer: the expert in float32."""

    @abstractmethod
    def record(self, key: Key) -> RecordInfo:
        """Form and size of an expert."""

    @abstractmethod
    def read_into(self, key: Key, buffer: memoryview) -> None:
        """Fill `buffer` (of the record's size) with the packed expert.

        Raises:
            PackageError: the bytes are not those that were written.
            OSError: the file cannot be read.
        """

    def read_bytes(self, key: Key) -> int:
        """What `read_into` reads from files."""
        return self.record(key).num_bytes

    @abstractmethod
    def close(self) -> None:
        """Close the files."""

    def keys(self) -> list[Key]:
        """Every kept expert, layer by layer."""
        return [
            (layer, row) for layer, experts in enumerate(self.kept) for row in range(len(experts))
        ]

    def forms(self) -> list[list[str]]:
        """[L][rows] of every kept expert."""
        return [
            [self.record((layer, row)).form for row in range(len(experts))]
            for layer, experts in enumerate(self.kept)
        ]

    def all_forms(self) -> set[str]:
        """Every form that a kept expert has."""
        return set(chain.from_iterable(self.forms()))


@dataclass(frozen=True)
class _OpenFile:
    """An open file, as it was then."""

    path: Path
    descriptor: int
    is_direct: bool
    """Whether O_DIRECT was granted."""
    state: tuple[int, int]

    @classmethod
    def open(cls, path: Path, is_aligned: bool) -> _OpenFile:
        descriptor, is_direct = (
            open_direct(path) if is_aligned else (os.open(path, os.O_RDONLY), False)
        )
        return cls(path, descriptor, is_direct, _state(descriptor))

    def require_unchanged(self) -> None:
        """Raise PackageError if it was written to: checksums are verified only once."""
        if _state(self.descriptor) != self.state:
            raise PackageError(
                f"{self.path} has changed while the model was running: start again with a file "
                "that nobody writes to"
            )

    def read(self, buffer: memoryview, offset: int) -> int:
        """Bytes read; 0 at the end. Raises OSError with the file's name."""
        try:
            return os.preadv(self.descriptor, [buffer], offset)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from None

    def ended(self) -> PackageError:
        """What to raise where bytes are missing."""
        return PackageError(
            f"{self.path} ended early: it was truncated after it was opened; build or "
            "download it again"
        )


def _state(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


class RecordFiles:
    """Open file descriptors and one aligned bounce buffer per thread."""

    def __init__(self, *, is_aligned: bool, largest_bytes: int = 0) -> None:
        """`largest_bytes` is the largest read to come; a bounce buffer is made once, for that."""
        self._is_aligned = is_aligned  # O_DIRECT reads only from multiples of 4096
        self._bounce_bytes = largest_bytes + -largest_bytes % RECORD_ALIGNMENT_BYTES
        self._open_files: dict[Path, _OpenFile] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def read(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`, around the page cache where possible."""
        file = self._open(path)
        file.require_unchanged()
        if file.is_direct:
            self._read_direct(file, offset, buffer)
            return
        done = 0
        while done < len(buffer):
            count = file.read(buffer[done:], offset + done)
            if count == 0:
                raise file.ended()
            done += count
        os.posix_fadvise(file.descriptor, offset, len(buffer), os.POSIX_FADV_DONTNEED)

    def _read_direct(self, file: _OpenFile, offset: int, buffer: memoryview) -> None:
        padded = -len(buffer) % RECORD_ALIGNMENT_BYTES + len(buffer)
        bounce, done = memoryview(self._bounce(padded)), 0
        while done < len(buffer):
            if done % RECORD_ALIGNMENT_BYTES:  # only the file's end is in the middle of a block
                raise file.ended()
            count = file.read(bounce[done:padded], offset + done)
            if count == 0:
                raise file.ended()
            done += count
        buffer[:] = bounce[: len(buffer)]

    def _bounce(self, num_bytes: int) -> mmap.mmap:
        bounce: mmap.mmap | None = getattr(self._local, "bounce", None)
        if bounce is None or len(bounce) < num_bytes:
            size = max(num_bytes, self._bounce_bytes)
            bounce = self._local.bounce = mmap.mmap(-1, size)  # page aligned
        return bounce

    def _open(self, path: Path) -> _OpenFile:
        with self._lock:
            if path not in self._open_files:
                self._open_files[path] = _OpenFile.open(path, self._is_aligned)
            return self._open_files[path]

    def close(self) -> None:
        with self._lock:
            for file in self._open_files.values():
                os.close(file.descriptor)
            self._open_files.clear()


class PackageStore(ExpertStore):
    """Experts of a native package. A record's checksum is verified the first time it is read."""

    def __init__(self, package: Package) -> None:
        self._package = package
        sizes = [record.num_bytes for layer in package.manifest.layers for record in layer.experts]
        self._files = RecordFiles(is_aligned=True, largest_bytes=max(sizes, default=0))
        self._verified: set[Key] = set()
        self.kept = [
            [record.expert_id for record in layer.experts] for layer in package.manifest.layers
        ]

    def record(self, key: Key) -> RecordInfo:
        record = self._record(key)
        return RecordInfo(record.form, record.num_bytes)

    def read_into(self, key: Key, buffer: memoryview) -> None:
        record = self._record(key)
        path = self._package.folder / record.file
        self._files.read(path, record.offset, buffer)
        if key in self._verified:
            return
        found = zlib.crc32(buffer)
        if found != record.crc32:
            layer_id = self._package.manifest.layers[key[0]].layer_id
            raise PackageError(
                f"{path}: layer {layer_id} expert {record.expert_id} is damaged "
                f"(checksum {found:08x}, expected {record.crc32:08x}): build the package again"
            )
        self._verified.add(key)

    def _record(self, key: Key) -> ExpertRecord:
        return self._package.manifest.layers[key[0]].experts[key[1]]

    def close(self) -> None:
        self._files.close()


def _is_finite(buffer: memoryview, form: str) -> bool:
    """Whether no value in the bytes of a 16- or 32-bit form is NaN or infinite."""
    dtype, exponent = _EXPONENTS[form]
    words = np.frombuffer(buffer, dtype=dtype)
    return not bool(((words & exponent) == exponent).any())


class CheckpointStore(ExpertStore):
    """Experts of an ordinary checkpoint, in the dtype it has."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files = RecordFiles(is_aligned=False)
        self.unpacks = not checkpoint.has_contiguous_experts
        spec = checkpoint.spec
        self._layer_ids = spec.moe_layer_ids
        self.kept = [list(range(spec.num_experts)) for _ in spec.moe_layer_ids]
        self._records = {key: self._record_of(key) for key in self.keys()}
        self._verified: set[Key] = set()

    def record(self, key: Key) -> RecordInfo:
        return self._records[key]

    def read_into(self, key: Key, buffer: memoryview) -> None:
        layer_id, expert_id = self._layer_ids[key[0]], key[1]
        if not self._checkpoint.has_contiguous_experts:
            weights = self._checkpoint.expert(layer_id, expert_id)  # checked for NaN
            buffer[:] = pack_expert(self._records[key].form, *weights).data
            return
        parts = self._checkpoint.expert_ranges(layer_id, expert_id)
        start = 0
        for part in parts:
            self._files.read(part.path, part.offset, buffer[start : start + part.num_bytes])
            start += part.num_bytes
        if key in self._verified:
            return
        if not _is_finite(buffer, self._records[key].form):
            raise CheckpointError(
                f"{parts[0].path}: layer {layer_id} expert {expert_id} "
                "holds NaN or infinity; the checkpoint is damaged: download it again"
            )
        self._verified.add(key)

    def _record_of(self, key: Key) -> RecordInfo:
        """Form and size of an expert.

        Raises:
            CheckpointError: not BF16, F16 or F32 throughout.
        """
        checkpoint, spec = self._checkpoint, self._checkpoint.spec
        dtypes = sorted(set(checkpoint.expert_dtypes(self._layer_ids[key[0]], key[1])))
        if len(dtypes) != 1 or dtypes[0] not in _FORM_OF_DTYPE:
            raise CheckpointError(
                f"{checkpoint.folder}: layer {self._layer_ids[key[0]]} expert {key[1]} is stored "
                f"as {' and '.join(dtypes)}; edge-moe runs experts of one dtype, BF16, F16 or F32"
            )
        form = _FORM_OF_DTYPE[dtypes[0]]
        return RecordInfo(form, expert_bytes(form, *spec.expert_shape))

    def close(self) -> None:
        self._files.close()
