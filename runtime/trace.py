"""`Trace`: which experts the router chose, token by token; a file that the simulator replays.

A safetensors file. N tokens, S forward passes ("steps": a piece of a prompt, or one token), L MoE
layers, k top_k:

    rows         uint16  [N, L, k]  chosen router rows, before any skipping
    weights      float16 [N, L, k]  their weights, as the router gave them
    token_norms  float32 [N, L]     L1 norm of the MoE block's input: what ODP protects tokens by
    step_tokens  uint32  [S]        tokens per step; a step reads each expert that it needs once

llama.cpp tells the rows only: weights and norms are zero then, and `has_weights` is false.

4 (k + 1) bytes per token and layer, also in memory while it is recorded: 1.7 kB per token for 48
layers of top-8.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edge_moe.errors import InputError
from edge_moe.files import atomic_path

TRACE_VERSION = 2
_INFO_KEY = "edge_moe_trace"
_DTYPES = {
    "rows": "uint16",
    "weights": "float16",
    "token_norms": "float32",
    "step_tokens": "uint32",
}

Array = npt.NDArray[Any]


class TraceInfo(BaseModel):
    """What the rows of a trace refer to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = TRACE_VERSION
    model_fingerprint: str
    """Of the checkpoint that the traced model is, or was built from."""
    moe_layer_ids: tuple[int, ...]
    top_k: int
    kept: tuple[tuple[int, ...], ...]
    """Per MoE layer the expert ids of the router's rows, in row order."""
    has_weights: bool = True
    """Whether weights and token norms were recorded; else they are zero."""


@dataclass(frozen=True, eq=False)
class Trace:
    """The router's choices over some tokens; the module says what the arrays are."""

    info: TraceInfo
    rows: npt.NDArray[np.uint16]
    weights: npt.NDArray[np.float16]
    token_norms: npt.NDArray[np.float32]
    step_tokens: npt.NDArray[np.uint32]

    @property
    def num_tokens(self) -> int:
        return len(self.rows)

    def steps(self) -> Iterator[slice]:
        """The tokens of each step, in order."""
        start = 0
        for count in self.step_tokens.tolist():
            yield slice(start, start + count)
            start += count

    def gate_means(self, num_experts: int) -> npt.NDArray[np.float64]:
        """[L, num_experts] mean over tokens of each expert's weight, 0 where it was not chosen.

        Raises:
            InputError: a trace without weights.
        """
        if not self.info.has_weights:
            raise InputError("the trace holds no weights: record one of a checkpoint or package")
        means = np.zeros((len(self.info.kept), num_experts))
        for layer, kept in enumerate(self.info.kept):
            ids = np.asarray(kept)[self.rows[:, layer]]
            np.add.at(means[layer], ids, self.weights[:, layer].astype(np.float64))
        return means / max(self.num_tokens, 1)

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _DTYPES}
        with atomic_path(path) as temporary:
            save_file(arrays, temporary, metadata={_INFO_KEY: self.info.model_dump_json()})

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read and check what `save` wrote.

        Raises:
            InputError: missing, damaged, another version, or arrays that contradict each other.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                text = (file.metadata() or {}).get(_INFO_KEY)
                arrays = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise InputError(f"trace {path} is not readable ({error}): record it again") from None
        if text is None:
            raise InputError(f"{path} is no trace: record one with `edge-moe trace`")
        info = _read_info(path, text)
        _check_arrays(path, info, arrays)
        return cls(info, **arrays)


class TraceRecorder:
    """Collects what the router chose, layer by layer."""

    def __init__(self) -> None:
        self._steps: list[list[tuple[Array, Array, Array]]] = []

    def add(self, layer: int, rows: Array, weights: Array, token_norms: Array) -> None:
        """One layer of a step: [T, k], [T, k] and [T]. Layer 0 begins a step."""
        if layer == 0:
            self._steps.append([])
        self._steps[-1].append(
            (
                rows.astype(np.uint16),
                weights.astype(np.float16),
                token_norms.astype(np.float32),
            )
        )

    def add_rows(self, layer: int, rows: Array) -> None:
        """One layer of a step, whose weights and norms are not known: [T, k]."""
        self.add(layer, rows, np.zeros(rows.shape), np.zeros(len(rows)))

    def finish(self, info: TraceInfo) -> Trace:
        """Everything so far; a step that was interrupted between two layers is left out."""
        num_layers, top_k = len(info.kept), info.top_k
        steps = [step for step in self._steps if len(step) == num_layers]
        rows = [np.stack([layer[0] for layer in step], axis=1) for step in steps]
        weights = [np.stack([layer[1] for layer in step], axis=1) for step in steps]
        norms = [np.stack([layer[2] for layer in step], axis=1) for step in steps]
        return Trace(
            info,
            rows=np.concatenate([np.zeros((0, num_layers, top_k), np.uint16), *rows]),
            weights=np.concatenate([np.zeros((0, num_layers, top_k), np.float16), *weights]),
            token_norms=np.concatenate([np.zeros((0, num_layers), np.float32), *norms]),
            step_tokens=np.array([len(step) for step in rows], np.uint32),
        )


def _read_info(path: Path, text: str) -> TraceInfo:
    try:
        raw = json.loads(text)
        found = raw.get("version") if isinstance(raw, dict) else None
        if found != TRACE_VERSION:
            raise InputError(
                f"trace {path} has version {found}, this edge-moe reads {TRACE_VERSION}: "
                "record it again"
            )
        return TraceInfo.model_validate(raw)
    except (json.JSONDecodeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"trace {path} has a damaged header ({reason}): record it again") from None


def _check_arrays(path: Path, info: TraceInfo, arrays: dict[str, Array]) -> None:
    """Raise InputError unless the arrays have the shapes and values that `info` implies."""

    def require(is_right: bool, what: str) -> None:
        if not is_right:
            raise InputError(f"trace {path} is damaged: {what}; record it again")

    found = {name: str(array.dtype) for name, array in arrays.items()}
    require(found == _DTYPES, f"arrays are {found}, expected {_DTYPES}")
    rows, weights, steps = arrays["rows"], arrays["weights"], arrays["step_tokens"]
    num_layers = len(info.moe_layer_ids)
    require(len(info.kept) == num_layers, f"{len(info.kept)} lists of experts, {num_layers} layers")
    shape = (len(rows), num_layers, info.top_k)
    require(rows.shape == shape and weights.shape == shape, f"rows are not {list(shape)}")
    require(arrays["token_norms"].shape == shape[:2], f"token_norms are not {list(shape[:2])}")
    require(steps.ndim == 1 and int(steps.sum()) == len(rows), "steps do not add up to the tokens")
    require(bool((steps > 0).all()), "a step has no token")
    for layer, kept in enumerate(info.kept):
        highest = int(rows[:, layer].max(initial=0))
        require(highest < max(len(kept), 1), f"row {highest} of {len(kept)} in layer {layer}")
    ordered = np.sort(rows, axis=2)
    require(not (ordered[:, :, 1:] == ordered[:, :, :-1]).any(), "a token chose a row twice")
    values = (weights, arrays["token_norms"])
    require(all(bool((np.isfinite(v) & (v >= 0)).all()) for v in values), "a weight is no number")
