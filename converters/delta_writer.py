"""Writing a delta file: what is known of every part while it is made, and then the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_moe.converters.delta_tensors import DeltaPart
from edge_moe.converters.safetensors_writer import TensorEntry, safetensors_file
from edge_moe.converters.source_bytes import read_chunks
from edge_moe.converters.sparsify import SparseTensor
from edge_moe.converters.staging import BuildFolder
from edge_moe.delta_info import INFO_KEY, DeltaInfo, ScaleRule
from edge_moe.delta_layout import SCALES, SEGMENT_DTYPE, TABLES, TABLES_KEY, tables_digest
from edge_moe.errors import InputError
from edge_moe.files import atomic_path
from edge_moe.tensor_info import TensorInfo

_TENSOR_FIELDS = ("num_kept", "magnitude", "kept_magnitude", "deviation", "square")
_TENSOR_DTYPE = np.dtype([(name, "<f8") for name in _TENSOR_FIELDS])
PartTables = tuple[npt.NDArray[np.void], npt.NDArray[np.void]]
"""Of a part's tensors, and of their segments."""


@dataclass(frozen=True)
class Scaling:
    """What a tensor's signs are multiplied by."""

    rule: ScaleRule = "l1"
    alpha: float | None = None
    """Of the rule `alpha`."""

    def check(self) -> None:
        """Raise InputError where rule and alpha do not belong together."""
        if (self.alpha is None) == (self.rule == "alpha"):
            raise InputError("--alpha is a rule of its own: leave out --scale")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise InputError(f"--alpha is {self.alpha}: give a positive number, or leave it out")


def save_tables(path: Path, found: Sequence[SparseTensor]) -> None:
    """Keep what is known of a part's tensors."""
    tensors = [tuple(getattr(each, name) for name in _TENSOR_FIELDS) for each in found]
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.save(handle, np.array(tensors, _TENSOR_DTYPE), allow_pickle=False)
        segments = np.concatenate([each.segments for each in found])
        np.save(handle, segments, allow_pickle=False)


def load_tables(work: BuildFolder, part: DeltaPart) -> PartTables:
    """(tensors, segments) as they were saved."""
    with (work.path / f"{part.name}.npy").open("rb") as handle:
        tensors = np.load(handle, allow_pickle=False)
        segments = np.load(handle, allow_pickle=False)
    assert tensors.dtype == _TENSOR_DTYPE and segments.dtype == SEGMENT_DTYPE
    return tensors, segments


def _scales(tensors: npt.NDArray[np.void], scaling: Scaling) -> npt.NDArray[np.float32]:
    """Per tensor; 0 where nothing is kept, for nothing differs there."""
    if scaling.alpha is not None:
        return np.asarray(scaling.alpha * tensors["deviation"], "<f4")
    magnitude = tensors["magnitude" if scaling.rule == "l1" else "kept_magnitude"]
    return np.asarray(magnitude / np.maximum(tensors["num_kept"], 1), "<f4")


@dataclass(frozen=True)
class DeltaDraft:
    """All that is in a delta but the scales."""

    info: DeltaInfo
    parts: Sequence[DeltaPart]
    tables: Sequence[PartTables]
    work: BuildFolder

    def write(self, output: Path, scaling: Scaling) -> None:
        """Tables first, widest items first, then the parts."""
        segments = np.concatenate([segments for _, segments in self.tables])
        scales = np.concatenate([_scales(tensors, scaling) for tensors, _ in self.tables])
        arrays = {name: scales if name == SCALES else segments[name] for name in TABLES}
        entries = [TensorEntry(name, TABLES[name], array.shape) for name, array in arrays.items()]
        parts = [self._stored(part) for part in self.parts]
        entries += [TensorEntry(each.name, each.dtype, each.shape) for each in parts]
        update = {"scale_rule": scaling.rule, "alpha": scaling.alpha}
        info = self.info.model_copy(update=update).model_dump_json()
        metadata = {INFO_KEY: info, TABLES_KEY: tables_digest(info, arrays.values())}
        with safetensors_file(output, entries, metadata=metadata) as writer:
            for name, array in arrays.items():
                writer.write(name, [np.ascontiguousarray(array).tobytes()])
            for each in parts:
                writer.write(each.name, read_chunks(each))

    def _stored(self, part: DeltaPart) -> TensorInfo:
        """The packed segments of a part."""
        path = self.work.path / f"{part.name}.bin"
        num_bytes = path.stat().st_size
        return TensorInfo(part.name, path, "U8", (num_bytes,), 0, num_bytes)
