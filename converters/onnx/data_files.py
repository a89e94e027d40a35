"""External weights: where every tensor lies, and writing them expert by expert.

One file holds the dense weights and one each MoE layer's experts, so that a killed build resumes at
the last complete layer. Large tensors start at multiples of 64 KiB, small ones of 4 KiB: every
system can map them (onnx/docs/ExternalData.md). An expert lies in one piece in each stack [E, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
import numpy.typing as npt

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.copy_range import write_all
from edge_moe.converters.packer import Packer
from edge_moe.converters.packing import expert_records
from edge_moe.converters.progress import Advance
from edge_moe.converters.source_bytes import read_float32
from edge_moe.converters.staging import BuildFolder
from edge_moe.files import atomic_path
from edge_moe.formats import unpack_expert
from edge_moe.formats.base import ByteArray
from edge_moe.formats.integers import IntegerForm, integer_form
from edge_moe.packed_tensors import PackedInfo
from edge_moe.spec import ModelSpec
from edge_moe.tensor_info import TensorInfo, to_float32

_PAGE_BYTES, _GRANULARITY_BYTES, _LARGE_BYTES = 4096, 65536, 2**20
_CHUNK_BYTES = 2 * 2**20
_ITEMSIZE_BYTES = {"FLOAT": 4, "UINT8": 1}

Chunks = Callable[[], Iterator[bytes]]


@dataclass(frozen=True)
class StoredTensor:
    """Bytes in an external file. `elem_type` is onnx's name: FLOAT, UINT8, UINT4, UINT2."""

    name: str
    elem_type: str
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int

    def item(self, index: int, suffix: str, elem_type: str, shape: tuple[int, ...]) -> StoredTensor:
        """One element along the first axis, seen as another type and shape."""
        length = self.length // self.shape[0]
        return replace(
            self,
            name=f"{self.name}.{index}{suffix}",
            elem_type=elem_type,
            shape=shape,
            offset=self.offset + index * length,
            length=length,
        )


@dataclass
class DataFile:
    """The layout of one external file, in order of placement."""

    name: str
    num_bytes: int = 0
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    def place(self, name: str, elem_type: str, shape: Sequence[int]) -> StoredTensor:
        """Reserve room for a tensor."""
        length = prod(shape) * _ITEMSIZE_BYTES[elem_type]
        unit = _GRANULARITY_BYTES if length >= _LARGE_BYTES else _PAGE_BYTES
        offset = self.num_bytes + -self.num_bytes % unit
        stored = StoredTensor(name, elem_type, tuple(shape), self.name, offset, length)
        self.tensors[name] = stored
        self.num_bytes = offset + length
        return stored


@dataclass
class DenseFile(DataFile):
    """Dense weights in float32, each with where it comes from."""

    sources: dict[str, Chunks] = field(default_factory=dict)

    def add(self, name: str, shape: Sequence[int], chunks: Chunks) -> StoredTensor:
        """Place a float32 tensor whose bytes `chunks` gives; the same name is placed once."""
        if name not in self.tensors:
            self.place(name, "FLOAT", shape)
            self.sources[name] = chunks
        return self.tensors[name]

    def write(self, work: BuildFolder, advance: Advance) -> None:
        """Write the file, unless an earlier build did. Memory: one chunk in float32."""
        if work.finished(self.name) is None:
            with atomic_path(work.path / self.name) as temporary, temporary.open("wb") as handle:
                for name, stored in self.tensors.items():
                    handle.seek(stored.offset)
                    for chunk in self.sources[name]():
                        handle.write(chunk)
            work.add(self.name)
        advance(self.num_bytes)


def float32_chunks(pieces: Sequence[TensorInfo]) -> Chunks:
    """The values of stored tensors as float32, some rows at a time.

    Raises (when called): CheckpointError: NaN, infinity, or a file that ends early.
    """

    def chunks() -> Iterator[bytes]:
        for piece in pieces:
            if isinstance(piece, PackedInfo):  # whose rows are no ranges of a file
                yield from (to_float32(chunk, piece.dtype).tobytes() for chunk in piece.chunks())
                continue
            for part in _row_blocks(piece):
                yield read_float32(part).tobytes()

    return chunks


def array_chunks(make: Callable[[int, int], npt.NDArray[np.float32]], num_rows: int) -> Chunks:
    """`make(start, end)` gives rows of a computed tensor."""

    def chunks() -> Iterator[bytes]:
        step = 4096
        for start in range(0, num_rows, step):
            yield np.ascontiguousarray(make(start, min(start + step, num_rows))).tobytes()

    return chunks


def _row_blocks(info: TensorInfo) -> Iterator[TensorInfo]:
    """`info` cut along its first axis into pieces of at most 2 MiB, or of one row."""
    num_rows = info.shape[0] if info.shape else 1
    row_bytes = info.num_bytes // num_rows
    step = max(1, _CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, num_rows, step):
        count = min(step, num_rows - start)
        yield replace(
            info,
            shape=(count, *info.shape[1:]),
            offset=info.offset + start * row_bytes,
            num_bytes=count * row_bytes,
        )


@dataclass(frozen=True)
class ExpertStack:
    """Experts of one layer in one form, stacked: a MoE or QMoE node's weights.

    fc1 [E, 2I, H] holds gate and up rows alternately (gate 0, up 0, gate 1, ...), fc2 is [E, H, I];
    of integer forms both are codes, with scales [E, rows, blocks] or, per row, [E, rows].
    """

    form: str
    expert_ids: tuple[int, ...]
    """Ids in the source checkpoint."""
    rows: tuple[int, ...]
    """Their rows in the sliced router."""
    fc1: StoredTensor
    fc2: StoredTensor
    scales1: StoredTensor | None = None
    scales2: StoredTensor | None = None

    @property
    def integer_form(self) -> IntegerForm | None:
        """How the codes are laid out; None for float32."""
        return integer_form(self.form)


@dataclass
class ExpertFile(DataFile):
    """The kept experts of one layer."""

    layer_id: int = 0
    stacks: list[ExpertStack] = field(default_factory=list)

    def add(
        self, form: str, experts: Sequence[tuple[int, int]], hidden_size: int, expert_width: int
    ) -> ExpertStack:
        """Place the (expert_id, router row) pairs that are stored in `form`."""
        count, prefix = len(experts), f"layers.{self.layer_id}.experts.{form}"
        rows, widths = (2 * expert_width, hidden_size), (hidden_size, expert_width)
        kind = integer_form(form)
        ids, router_rows = zip(*experts, strict=True)
        if kind is None:
            fc1, fc2 = (
                self.place(f"{prefix}.fc{index}", "FLOAT", (count, rows[index - 1], width))
                for index, width in enumerate(widths, start=1)
            )
            stack = ExpertStack(form, ids, router_rows, fc1, fc2)
        else:
            placed = []
            for index, (row_count, width) in enumerate(zip(rows, widths, strict=True), start=1):
                blocks = () if kind.row_blocks else (width // kind.block_size,)
                code_bytes = width * kind.bits // 8
                codes = self.place(f"{prefix}.fc{index}", "UINT8", (count, row_count, code_bytes))
                scales = self.place(f"{prefix}.scales{index}", "FLOAT", (count, row_count, *blocks))
                placed.append((codes, scales))
            (fc1, scales1), (fc2, scales2) = placed
            stack = ExpertStack(form, ids, router_rows, fc1, fc2, scales1, scales2)
        self.stacks.append(stack)
        return stack

    def write(
        self, checkpoint: Checkpoint, packer: Packer, work: BuildFolder, advance: Advance
    ) -> None:
        """Write the file, unless an earlier build did. Memory: `packing.packing_peak_bytes`.

        Raises:
            CheckpointError: NaN, infinity, or a file that ends early.
        """
        if work.finished(self.name) is not None:
            advance(self.num_bytes)
            return
        spec = checkpoint.spec
        with atomic_path(work.path / self.name) as temporary, temporary.open("wb") as handle:
            handle.truncate(self.num_bytes)
            for stack in self.stacks:
                experts = [(expert_id, stack.form) for expert_id in stack.expert_ids]
                records = expert_records(checkpoint, self.layer_id, experts, packer)
                for index, chunks in enumerate(records):
                    record = np.frombuffer(b"".join(chunks), np.uint8)
                    for stored, data in _node_arrays(stack, record, spec):
                        item_bytes = stored.length // stored.shape[0]
                        assert data.nbytes == item_bytes
                        write_all(
                            handle.fileno(), data.tobytes(), stored.offset + index * item_bytes
                        )
                        advance(item_bytes)
        work.add(self.name)


def _node_arrays(
    stack: ExpertStack, record: ByteArray, spec: ModelSpec
) -> Iterator[tuple[StoredTensor, npt.NDArray[np.generic]]]:
    """One expert's packed record as the node reads it; without a gate, up rows stand for it."""
    form, (hidden_size, expert_width, has_gate) = stack.integer_form, spec.expert_shape
    if form is None:
        gate, up, down = unpack_expert(stack.form, record, *spec.expert_shape)
        yield stack.fc1, interleave(gate if has_gate else up, up)
        yield stack.fc2, down
        return
    assert stack.scales1 is not None and stack.scales2 is not None
    row_bytes, down_bytes = form.row_bytes(hidden_size), form.row_bytes(expert_width)
    *inner, last = np.split(record, [expert_width * row_bytes * n for n in range(1, 2 + has_gate)])
    gate_rows, up_rows = (
        form.split(rows.reshape(expert_width, row_bytes), hidden_size)
        for rows in (inner[0], inner[-1])
    )
    codes, scales = form.split(last.reshape(hidden_size, down_bytes), expert_width)
    yield stack.fc1, interleave(gate_rows[0], up_rows[0])
    yield stack.scales1, interleave(gate_rows[1], up_rows[1])
    yield stack.fc2, codes
    yield stack.scales2, scales


def interleave(
    gate: npt.NDArray[np.generic], up: npt.NDArray[np.generic]
) -> npt.NDArray[np.generic]:
    """[I, n] twice -> [2I, n]: gate 0, up 0, gate 1, up 1, ..."""
    return np.stack([gate, up], axis=1).reshape(-1, gate.shape[1])
