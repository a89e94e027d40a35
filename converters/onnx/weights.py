"""A checkpoint's dense tensors on their way into the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from edge_moe.checkpoint import Checkpoint, expert_axis
from edge_moe.converters.onnx.data_files import (
    Chunks,
    DenseFile,
    StoredTensor,
    array_chunks,
    float32_chunks,
)
from edge_moe.converters.onnx.operations import Operations
from edge_moe.converters.source_bytes import rows
from edge_moe.errors import TargetError
from edge_moe.tensor_info import TensorInfo


class Weights:
    """Places tensors of `checkpoint` in `dense`, in float32; each that is asked for is used."""

    def __init__(
        self, checkpoint: Checkpoint, dense: DenseFile, epsilon: float, adds_one: bool
    ) -> None:
        """`epsilon` is that of norms, which multiply by 1 + their weight if it `adds_one`."""
        self._checkpoint = checkpoint
        self._dense = dense
        self._epsilon = epsilon
        self._adds_one = adds_one
        self._used: set[str] = set()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All that the checkpoint holds, by name."""
        return self._checkpoint.tensors

    def linear(self, operations: Operations, name: str, value: str) -> str:
        """A linear layer, with its bias where it has one."""
        output = operations.linear(value, self.weight(name))
        bias = self.optional(f"{name}.bias")
        if bias is None:
            return output
        return operations.graph.op("Add", [output, operations.graph.weight(bias)])

    def weight(self, module: str) -> StoredTensor:
        """The weight of a module."""
        return self.tensor(f"{module}.weight")

    def norm(self, operations: Operations, name: str, value: str) -> str:
        """A norm of the last axis: over its root mean square, or LayerNorm where it has a bias."""
        has_bias = f"{name}.bias" in self.tensors
        stored = self.tensor(f"{name}.weight", adds_one=self._adds_one and not has_bias)
        if has_bias:
            bias = self.tensor(f"{name}.bias")
            return operations.layer_norm(value, stored, bias, self._epsilon)
        return operations.rms_norm(value, stored, self._epsilon)

    def optional(self, name: str) -> StoredTensor | None:
        """A tensor that not every checkpoint has."""
        return self.tensor(name) if name in self.tensors else None

    def tensor(self, name: str, *, adds_one: bool = False) -> StoredTensor:
        """A tensor, whole; or 1 + it."""
        info = self.tensors[name]
        self._used.add(name)
        chunks = float32_chunks([info])
        return self._dense.add(name, info.shape, _plus_one(chunks) if adds_one else chunks)

    def rows(self, name: str, kept: Sequence[int], label: str = "") -> StoredTensor:
        """The rows of kept experts; `label` tells several choices of one tensor's rows apart."""
        info = self.tensors[name]
        self._used.add(name)
        if expert_axis(info, self._checkpoint.spec.num_experts) == 1:
            info = replace(info, shape=info.shape[1:])  # behind an axis of one row
        shape, placed = (len(kept), *info.shape[1:]), f"{name}.{label}" if label else name
        return self._dense.add(placed, shape, float32_chunks(rows(info, kept)))

    def computed(
        self,
        name: str,
        num_rows: int,
        width: int,
        make: Callable[[int, int], npt.NDArray[np.float32]],
    ) -> StoredTensor:
        """A tensor [num_rows, width] that no checkpoint holds; `make(start, end)` gives rows."""
        return self._dense.add(name, (num_rows, width), array_chunks(make, num_rows))

    def require_all_used(self) -> None:
        """Nothing of the checkpoint may be left out.

        Raises:
            TargetError: names the first tensor that nobody asked for.
        """
        spec = self._checkpoint.spec
        names = {info.name for info in self._checkpoint.dense_tensors} - self._used
        left = sorted(
            name for name in names if not (spec.is_tied_head(name) or "rotary_emb" in name)
        )
        if left:
            raise TargetError(
                f"target onnx has no place for tensor {left[0]!r} ({len(left)} such): "
                "use --target native"
            )


def _plus_one(chunks: Chunks) -> Chunks:
    def raised() -> Iterator[bytes]:
        for chunk in chunks():
            yield (np.frombuffer(chunk, np.float32) + np.float32(1)).tobytes()

    return raised
