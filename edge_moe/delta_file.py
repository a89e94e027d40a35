"""`DeltaFile`: a task as a sparse ternary difference from a base model, one file of many.

The task vector tau = tuned - base of every tensor keeps its entries of the largest magnitude, and
of those only the sign: tau ~ scale * s with s in {-1, 0, 1}, one scale per tensor (ComPEFT,
arXiv:2311.13171, algorithm 1). `edge_moe.delta_layout` says how they lie in the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_moe.delta_info import INFO_KEY, read_info
from edge_moe.delta_layout import (
    DENSE_NAME,
    NUMPY_DTYPES,
    REMEDY,
    SCALES,
    SEGMENT_DTYPE,
    TABLES,
    TABLES_KEY,
    DeltaTensor,
    Segment,
    layer_name,
    num_segments,
    tables_digest,
    wrong_segments,
)
from edge_moe.errors import CheckpointError, DeltaError, TargetError
from edge_moe.safetensors_header import read_header
from edge_moe.sparse_signs import MOST_LENGTH, entropy_bytes
from edge_moe.tensor_info import TensorInfo, read_range

IntArray = npt.NDArray[np.int64]


class DeltaFile:
    """An opened and checked file. In memory: its tables, `table_bytes`."""

    def __init__(self, path: Path) -> None:
        """Read header and tables.

        Raises:
            DeltaError: missing, truncated, damaged, or of another version.
        """
        self.path = path
        if not path.exists():
            raise DeltaError(f"delta {path} does not exist: make one with `edge-moe delta`")
        try:
            tensors, metadata = read_header(path)
        except CheckpointError as error:
            raise DeltaError(f"delta {error}".replace("download", "copy")) from None
        self.info = read_info(path, metadata)
        self._tables = {name: self._read_table(tensors, name) for name in TABLES}
        digest = tables_digest(metadata[INFO_KEY], self._tables.values())
        if digest != metadata.get(TABLES_KEY):
            raise self._damaged("the checksum of its header and tables differs")
        self._check_tables(tensors)
        self._layers = {layer: index for index, layer in enumerate(self.info.moe_layer_ids)}

    @property
    def table_bytes(self) -> int:
        """Memory that the opened file takes."""
        arrays = (*self._tables.values(), self._starts, self._offsets)
        return sum(array.nbytes for array in arrays)

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size

    @property
    def num_kept(self) -> int:
        """Signs of all tensors."""
        return int(self._tables["kept"].sum(dtype=np.int64))

    @property
    def num_weights(self) -> int:
        """Entries of all tensors."""
        return sum(map(math.prod, self._shapes()))

    @property
    def entropy_bytes(self) -> float:
        """What the signs take at best, were they at random places."""
        total = 0.0
        for tensor in self.tensors():
            total += sum(entropy_bytes(part.num_kept, part.length) for part in tensor.segments)
        return total

    def tensors(self) -> Iterator[DeltaTensor]:
        """All of them, in order."""
        for index, shape in enumerate(self._shapes()):
            yield self._tensor(index, shape)

    def dense(self) -> Iterator[tuple[str, DeltaTensor]]:
        """(name, tensor) of everything but routed experts."""
        for index, each in enumerate(self.info.dense):
            yield each.name, self._tensor(index, each.shape)

    def expert(self, layer_id: int, expert_id: int) -> tuple[DeltaTensor, ...]:
        """gate_proj where there is one, up_proj, down_proj: they lie one after the other."""
        shapes = self.info.expert_shapes
        place = self._layers[layer_id] * self.info.num_experts + expert_id
        first = len(self.info.dense) + place * len(shapes)
        return tuple(self._tensor(first + number, shape) for number, shape in enumerate(shapes))

    def most_kept(self) -> tuple[int, ...]:
        """Most signs of gate_proj where there is one, up_proj and down_proj, over all experts."""
        ends = np.concatenate([[0], np.cumsum(self._tables["kept"], dtype=np.int64)])
        kept = np.diff(ends[self._starts])[len(self.info.dense) :]
        return tuple(kept.reshape(-1, len(self.info.expert_shapes)).max(axis=0).tolist())

    def most_expert_bytes(self) -> int:
        """Packed bytes of the largest expert."""
        first = self._starts[len(self.info.dense) :: len(self.info.expert_shapes)]
        return int(np.diff(self._offsets[first]).max())

    def require_base(self, fingerprint: str) -> None:
        """Raise DeltaError unless the delta was made against this checkpoint."""
        if self.info.base_fingerprint != fingerprint:
            raise DeltaError(
                f"delta {self.path} was made for {self.info.base} "
                f"({self.info.base_fingerprint[:12]}), not for this model ({fingerprint[:12]}): "
                "give that one or a package built from it, or make a delta from this one with "
                "`edge-moe delta`"
            )

    # -- private ----------------------------------------------------------------------------------

    def _shapes(self) -> Iterator[tuple[int, ...]]:
        for each in self.info.dense:
            yield each.shape
        for _ in range(len(self.info.moe_layer_ids) * self.info.num_experts):
            yield from self.info.expert_shapes

    def _tensor(self, index: int, shape: tuple[int, ...]) -> DeltaTensor:
        first, length = int(self._starts[index]), math.prod(shape)
        segments = tuple(
            Segment(
                start,
                min(MOST_LENGTH, length - start),
                int(self._offsets[first + number]),
                int(self._tables["sizes"][first + number]),
                int(self._tables["kept"][first + number]),
                int(self._tables["coding"][first + number]),
                int(self._tables["checksums"][first + number]),
            )
            for number, start in enumerate(range(0, length, MOST_LENGTH))
        )
        return DeltaTensor(shape, float(self._tables[SCALES][index]), segments)

    def _read_table(self, tensors: dict[str, TensorInfo], name: str) -> npt.NDArray[np.generic]:
        info, dtype = tensors.get(name), TABLES[name]
        if info is None or info.dtype != dtype or len(info.shape) != 1:
            raise self._damaged(f"no table {name!r} of {dtype}")
        try:
            raw = read_range(self.path, info.offset, info.num_bytes)
        except CheckpointError as error:
            raise self._damaged(str(error)) from None
        return np.frombuffer(raw, NUMPY_DTYPES[dtype])

    def _check_tables(self, tensors: dict[str, TensorInfo]) -> None:
        """Also finds where every tensor's segments start, and where every segment lies."""
        info, tables = self.info, self._tables
        if len(tables[SCALES]) != info.num_tensors:
            raise self._damaged(f"{len(tables['scales'])} scales for {info.num_tensors} tensors")
        scales = tables[SCALES].astype(np.float64)
        if not (np.isfinite(scales).all() and (scales >= 0).all()):
            raise self._damaged("a scale that is no positive number")
        weights = [math.prod(shape) for shape in self._shapes()]
        counts = list(map(num_segments, weights))
        num_total = sum(counts)  # may be anything until it is compared
        if any(len(tables[name]) != num_total for name in SEGMENT_DTYPE.names or ()):
            raise self._damaged(f"tables that are not of {num_total} segments")
        self._starts: IntArray = np.concatenate([[0], np.cumsum(counts)])
        lengths = np.full(num_total, MOST_LENGTH)
        lengths[self._starts[1:] - 1] = [(each - 1) % MOST_LENGTH + 1 for each in weights]
        kept, coding = tables["kept"].astype(np.int64), tables["coding"].astype(np.int64)
        is_wrong = wrong_segments(kept, coding, lengths)
        if is_wrong.any():
            raise self._damaged(f"segment {int(is_wrong.argmax())} keeps more than it holds")
        self._find_offsets(tensors)

    def _find_offsets(self, tensors: dict[str, TensorInfo]) -> None:
        info, sizes = self.info, self._tables["sizes"].astype(np.int64)
        if (sizes < 0).any():
            raise self._damaged("a segment of negative size")
        ends = np.concatenate([[0], np.cumsum(sizes)])
        per_layer = info.num_experts * len(info.expert_shapes)
        parts = [(DENSE_NAME, 0, len(info.dense))]
        for number, layer_id in enumerate(info.moe_layer_ids):
            first = len(info.dense) + number * per_layer
            parts.append((layer_name(layer_id), first, first + per_layer))
        self._offsets: IntArray = np.empty(len(sizes) + 1, np.int64)
        for name, first, stop in parts:
            start, end = self._starts[first], self._starts[stop]
            found, num_bytes = tensors.get(name), int(ends[end] - ends[start])
            if found is None or found.dtype != "U8" or found.num_bytes != num_bytes:
                raise self._damaged(f"no {name!r} of {num_bytes} bytes")
            self._offsets[start : end + 1] = found.offset + ends[start : end + 1] - ends[start]

    def _damaged(self, what: str) -> DeltaError:
        return DeltaError(f"delta {self.path} is damaged ({what}): {REMEDY}")


def refuse_delta(model: Path, runs: str, delta: Path | None) -> None:
    """Raise TargetError where a delta is given to a `model` that other programs run."""
    if delta is not None:
        raise TargetError(
            f"{model} runs in {runs}, which has nothing for --delta {delta}: give the checkpoint "
            "that it was made from, or build that with --target native (llama.cpp takes LoRA "
            "adapters: `edge-moe recover --gguf-lora`)"
        )
