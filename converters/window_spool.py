"""What every window did in every MoE layer, on disk: windows come in, layers go out.

    windows/0007.safetensors   window 7: for MoE layer L the tensors `L.inputs`, `L.gates`, ...

A window's file appears when the window is complete, so a killed run goes on with the next one.
Letters: T tokens of a window, H what an expert takes, E experts, k top_k.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edge_moe.converters.block_sums import ChosenExperts, TokenRecords
from edge_moe.converters.safetensors_writer import TensorEntry, header
from edge_moe.errors import StatsError
from edge_moe.files import atomic_path
from edge_moe.spec import ModelSpec

_NUMPY = {"F32": np.float32, "F64": np.float64, "I32": np.int32}
_ITEM_BYTES = {"F32": 4, "F64": 8, "I32": 4}


@dataclass(frozen=True)
class _Field:
    name: str
    dtype: str
    """safetensors spelling."""
    width: int
    """Numbers per token."""


def _fields(spec: ModelSpec) -> tuple[_Field, ...]:
    """What is kept of a token in a layer. Gates are float32 where they come from."""
    return (
        _Field("drop_losses", "F64", spec.top_k),
        _Field("norms", "F64", spec.top_k),
        _Field("shifts", "F64", 1),
        _Field("moe_squares", "F64", 1),
        _Field("residual_squares", "F64", 1),
        _Field("inputs", "F32", spec.expert_hidden),
        _Field("gates", "F32", spec.top_k),
        _Field("largest", "F32", spec.top_k),
        _Field("logits", "F32", spec.num_experts),
        _Field("expert_ids", "I32", spec.top_k),
    )


def spool_bytes(spec: ModelSpec, num_tokens: int) -> int:
    """Disk bytes of that many tokens: 4H + 4E + 28k + 24 per MoE layer and token, headers aside."""
    per_token = sum(_ITEM_BYTES[field.dtype] * field.width for field in _fields(spec))
    return num_tokens * spec.num_moe_layers * per_token


class WindowSpool:
    """The folder of one run's windows."""

    def __init__(self, folder: Path, spec: ModelSpec, window_lengths: Sequence[int]) -> None:
        self._folder = folder
        self._spec = spec
        self._window_lengths = window_lengths
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".*.tmp"):  # of a run that was killed
            path.unlink()

    def missing(self) -> list[int]:
        """Positions of the windows that are not complete yet."""
        lengths = range(len(self._window_lengths))
        return [index for index in lengths if not self._path(index).exists()]

    @property
    def is_empty(self) -> bool:
        return len(self.missing()) == len(self._window_lengths)

    @contextmanager
    def writing(self, index: int) -> Iterator[WindowWriter]:
        """Write window `index` piece by piece; it counts when the block ends."""
        with atomic_path(self._path(index)) as temporary:
            writer = WindowWriter(temporary, self._spec, self._window_lengths[index])
            yield writer
            writer.close()

    def read(self, index: int, layer_id: int) -> TokenRecords:
        """One window in one layer.

        Raises:
            StatsError: the file is missing or damaged.
        """
        path = self._path(index)
        try:
            with safe_open(path, framework="pt") as handle:
                found = {
                    field.name: handle.get_tensor(f"{layer_id}.{field.name}")
                    for field in _fields(self._spec)
                }
        except (OSError, SafetensorError) as error:
            raise StatsError(
                f"{path} is damaged ({error}): remove {self._folder.parent} and calibrate again"
            ) from None
        return TokenRecords(
            chosen=ChosenExperts(
                inputs=found["inputs"],
                expert_ids=found["expert_ids"].long(),
                gates=found["gates"].double(),
                norms=found["norms"],
                largest=found["largest"],
                drop_losses=found["drop_losses"],
            ),
            logits=found["logits"],
            shifts=found["shifts"][:, 0],
            moe_squares=found["moe_squares"][:, 0],
            residual_squares=found["residual_squares"][:, 0],
        )

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:04}.safetensors"


def _reserve(fd: int, num_bytes: int, path: Path) -> None:
    """Take the disk's space now: a page of a mapping that has none ends the process (SIGBUS).

    Raises:
        OSError: the disk is full; names `path`.
    """
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from None


class WindowWriter:
    """One window's file, mapped into memory while its pieces arrive."""

    def __init__(self, path: Path, spec: ModelSpec, num_tokens: int) -> None:
        entries = [
            TensorEntry(f"{layer_id}.{field.name}", field.dtype, (num_tokens, field.width))
            for layer_id in spec.moe_layer_ids
            for field in _fields(spec)
        ]
        start = header(entries)
        num_bytes = len(start) + sum(entry.num_bytes for entry in entries)
        with path.open("wb") as handle:
            handle.write(start)
            handle.flush()
            _reserve(handle.fileno(), num_bytes, path)
        self._file = np.memmap(path, np.uint8, "r+")
        self._rows: dict[str, npt.NDArray[Any]] = {}
        offset = len(start)
        for entry in entries:
            piece = self._file[offset : offset + entry.num_bytes]
            self._rows[entry.name] = piece.view(_NUMPY[entry.dtype]).reshape(entry.shape)
            offset += entry.num_bytes
        self._is_written = np.zeros((num_tokens, spec.num_moe_layers), bool)
        self._layer_rows = {layer_id: row for row, layer_id in enumerate(spec.moe_layer_ids)}

    def put(self, layer_id: int, tokens: slice, records: TokenRecords) -> None:
        """What a piece of the window did in one layer."""
        chosen = records.chosen
        values: dict[str, Tensor] = {
            "inputs": chosen.inputs,
            "expert_ids": chosen.expert_ids.to(torch.int32),
            "gates": chosen.gates.float(),
            "norms": chosen.norms,
            "largest": chosen.largest,
            "drop_losses": chosen.drop_losses,
            "logits": records.logits,
            "shifts": records.shifts[:, None],
            "moe_squares": records.moe_squares[:, None],
            "residual_squares": records.residual_squares[:, None],
        }
        for name, value in values.items():
            self._rows[f"{layer_id}.{name}"][tokens] = value.numpy()
        self._is_written[tokens, self._layer_rows[layer_id]] = True

    def close(self) -> None:
        """Write everything to the file."""
        if not self._is_written.all():
            missing = math.prod(self._is_written.shape) - int(self._is_written.sum())
            raise RuntimeError(f"{missing} tokens of a window were not written")
        self._rows.clear()
        self._file.flush()
