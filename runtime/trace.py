"""`Trace`: which experts the router chose, token by token; a file that the simulator replays.

A safetensors file. N tokens, S forward passes ("steps": a piece of a prompt, or one token), L MoE
layers, k top_k:

    rows         uint16  [N, L, k]  chosen router rows, before any skipping
    weights      float16 [N, L, k]  their weights, as the router gave them
    token_norms  float32 [N, L]     L1 norm of the MoE block's input: what ODP protects tokens by
    step_tokens  uint32  [S]        tokens per step; a step reads each expert that it needs once
    token_ids    uint32  [N]        what went in; absent where nobody said
    guesses.NAME uint16  [N, L, w]  rows that NAME guessed for the layer from the state before the
                                    one before it, likeliest first; `NO_GUESS` where it did not:
                                    in the first layer and in steps of several tokens

llama.cpp tells the rows only: weights and norms are zero then, and `has_weights` is false. Version
2 had neither token ids nor guesses; such files are read.

4 (k + 1) bytes per token and layer, also in memory while it is recorded, and 2 w for every kind of
guess: 3.3 kB per token for 48 layers of top-8 and guesses twice as wide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from edge_moe.errors import InputError
from edge_moe.json_files import parse_info
from edge_moe.runtime.tensor_file import read_tensor_file, write_tensor_file

TRACE_VERSION = 3
_READ_VERSIONS = (2, TRACE_VERSION)
_INFO_KEY = "edge_moe_trace"
_DTYPES = {
    "rows": "uint16",
    "weights": "float16",
    "token_norms": "float32",
    "step_tokens": "uint32",
}
_TOKEN_IDS = "token_ids"
_GUESSES = "guesses."
NO_GUESS = 65535

Array = npt.NDArray[Any]


class TraceInfo(BaseModel):
    """What the rows of a trace refer to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = TRACE_VERSION
    model_fingerprint: str
    """Of the checkpoint that the traced model is, or was built from."""
    moe_layer_ids: tuple[int, ...]
    top_k: int = Field(gt=0)
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
    token_ids: npt.NDArray[np.uint32] | None = None
    guesses: Mapping[str, npt.NDArray[np.uint16]] = field(default_factory=dict)

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
        arrays = {name: getattr(self, name) for name in _DTYPES}
        if self.token_ids is not None:
            arrays[_TOKEN_IDS] = self.token_ids
        arrays |= {_GUESSES + name: rows for name, rows in self.guesses.items()}
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        write_tensor_file(path, arrays, _INFO_KEY, self.info)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read and check what `save` wrote.

        Raises:
            InputError: missing, damaged, another version, arrays that contradict each other, or
                no token.
        """
        text, arrays = read_tensor_file(path, _INFO_KEY, kind="trace", again="record it again")
        if text is None:
            raise InputError(f"{path} is no trace: record one with `edge-moe trace`")
        info = parse_info(
            *(path, text, TraceInfo, _READ_VERSIONS), kind="trace", again="record it again"
        )
        _check_arrays(path, info, arrays)
        guesses = {
            name.removeprefix(_GUESSES): arrays.pop(name)
            for name in list(arrays)
            if name.startswith(_GUESSES)
        }
        return cls(info, **arrays, guesses=guesses)


class _Step:
    """What is known of one forward pass."""

    def __init__(self, token_ids: Array | None) -> None:
        self.token_ids = token_ids
        self.layers: list[tuple[Array, Array, Array]] = []
        self.guesses: dict[str, dict[int, list[int]]] = {}

    @property
    def num_tokens(self) -> int:
        return len(self.layers[0][0])

    def guessed(self, name: str, width: int) -> Array:
        """uint16 [T, L, width]"""
        rows = np.full((self.num_tokens, len(self.layers), width), NO_GUESS, np.uint16)
        for layer, guessed in self.guesses.get(name, {}).items():
            rows[0, layer, : len(guessed)] = guessed
        return rows


class TraceRecorder:
    """Collects what the router chose, layer by layer."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._token_ids: Array | None = None

    def begin(self, token_ids: Sequence[int]) -> None:
        """A step of these tokens is about to be computed."""
        self._token_ids = np.array(token_ids, np.uint32)

    def add(self, layer: int, rows: Array, weights: Array, token_norms: Array) -> None:
        """One layer of a step: [T, k], [T, k] and [T]. Layer 0 begins a step."""
        if layer == 0:
            self._steps.append(_Step(self._token_ids))
            self._token_ids = None
        self._steps[-1].layers.append(
            (
                rows.astype(np.uint16),
                weights.astype(np.float16),
                token_norms.astype(np.float32),
            )
        )

    def add_rows(self, layer: int, rows: Array) -> None:
        """One layer of a step, whose weights and norms are not known: [T, k]."""
        self.add(layer, rows, np.zeros(rows.shape), np.zeros(len(rows)))

    def add_guess(self, name: str, layer: int, rows: Sequence[int]) -> None:
        """`rows` of `layer`, likeliest first, were guessed before its router chose: one token."""
        self._steps[-1].guesses.setdefault(name, {})[layer] = list(rows)

    def finish(self, info: TraceInfo) -> Trace:
        """Everything so far; a step that was interrupted between two layers is left out."""
        num_layers, top_k = len(info.kept), info.top_k
        steps = [step for step in self._steps if len(step.layers) == num_layers]
        rows, weights, norms = (
            [np.stack([layer[part] for layer in step.layers], axis=1) for step in steps]
            for part in range(3)
        )
        return Trace(
            info,
            rows=np.concatenate([np.zeros((0, num_layers, top_k), np.uint16), *rows]),
            weights=np.concatenate([np.zeros((0, num_layers, top_k), np.float16), *weights]),
            token_norms=np.concatenate([np.zeros((0, num_layers), np.float32), *norms]),
            step_tokens=np.array([len(step) for step in rows], np.uint32),
            token_ids=_token_ids(steps),
            guesses=_guesses(steps),
        )


def _token_ids(steps: Sequence[_Step]) -> npt.NDArray[np.uint32] | None:
    """Of all steps; None unless every one of them knows its tokens."""
    known = [step.token_ids for step in steps if step.token_ids is not None]
    if len(known) != len(steps) or any(
        len(ids) != step.num_tokens for ids, step in zip(known, steps, strict=True)
    ):
        return None
    return np.concatenate([np.zeros(0, np.uint32), *known])


def _guesses(steps: Sequence[_Step]) -> dict[str, npt.NDArray[np.uint16]]:
    found = {}
    for name in sorted({name for step in steps for name in step.guesses}):
        width = max(len(rows) for step in steps for rows in step.guesses.get(name, {}).values())
        if width:
            found[name] = np.concatenate([step.guessed(name, width) for step in steps])
    return found


def _check_arrays(path: Path, info: TraceInfo, arrays: dict[str, Array]) -> None:
    """Raise InputError unless the arrays have the shapes and values that `info` implies."""

    def require(is_right: bool, what: str) -> None:
        if not is_right:
            raise InputError(f"trace {path} is damaged: {what}; record it again")

    found = {name: str(array.dtype) for name, array in arrays.items()}
    guesses = {name: array for name, array in arrays.items() if name.startswith(_GUESSES)}
    optional = dict.fromkeys(guesses, "uint16") | {_TOKEN_IDS: "uint32"}
    expected = _DTYPES | {name: kind for name, kind in optional.items() if name in found}
    require(found == expected, f"arrays are {found}, expected {expected}")
    rows, weights, steps = arrays["rows"], arrays["weights"], arrays["step_tokens"]
    require(rows.ndim == 3, f"rows have {rows.ndim} dimensions, not 3")
    require(len(rows) > 0, "it holds no token")
    num_layers = len(info.moe_layer_ids)
    require(num_layers > 0, "it has no layer")
    require(len(info.kept) == num_layers, f"{len(info.kept)} lists of experts, {num_layers} layers")
    shape = (len(rows), num_layers, info.top_k)
    require(rows.shape == shape and weights.shape == shape, f"rows are not {list(shape)}")
    require(arrays["token_norms"].shape == shape[:2], f"token_norms are not {list(shape[:2])}")
    require(steps.ndim == 1 and int(steps.sum()) == len(rows), "steps do not add up to the tokens")
    require(bool((steps > 0).all()), "a step has no token")
    for layer, kept in enumerate(info.kept):
        highest = int(rows[:, layer].max(initial=0))
        require(highest < len(kept), f"row {highest} of {len(kept)} in layer {layer}")
    ordered = np.sort(rows, axis=2)
    require(not (ordered[:, :, 1:] == ordered[:, :, :-1]).any(), "a token chose a row twice")
    token_ids = arrays.get(_TOKEN_IDS)
    is_right = token_ids is None or token_ids.shape == shape[:1]
    require(is_right, f"token_ids are not {list(shape[:1])}")
    for name, array in guesses.items():
        require(array.ndim == 3 and array.shape[:2] == shape[:2], f"{name} are not {list(shape)}")
        for layer, kept in enumerate(info.kept):
            known = array[:, layer][array[:, layer] != NO_GUESS]
            highest = int(known.max(initial=0))
            require(highest < len(kept), f"{name}: row {highest} in layer {layer}")
    values = (weights, arrays["token_norms"])
    require(all(bool((np.isfinite(v) & (v >= 0)).all()) for v in values), "a weight is no number")
