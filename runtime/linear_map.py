"""`LinearMap`: what a layer's input says of the next layer's router, fitted once on text.

A safetensors file. H hidden_size, E_l experts of MoE layer l; for every layer but the first:

    map.LAYER     float32 [E_l, H]  times the input of the MoE block before it
    offset.LAYER  float32 [E_l]     plus this: what the router of LAYER ranks its experts by
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import save_file

from edge_moe.errors import InputError
from edge_moe.files import atomic_path
from edge_moe.runtime.predictors import Predictor, largest_logits
from edge_moe.runtime.tensor_file import read_tensor_file

LINEAR_MAP_VERSION = 1
_INFO_KEY = "edge_moe_linear_map"

FloatArray = npt.NDArray[np.float32]


class LinearMapInfo(BaseModel):
    """What a map belongs to, and how it was fitted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = LINEAR_MAP_VERSION
    model_fingerprint: str
    """Of the checkpoint that the model is, or was built from."""
    hidden_size: int
    kept: tuple[tuple[int, ...], ...]
    """Per MoE layer the expert ids of the map's rows."""
    tasks: tuple[str, ...]
    num_tokens: int
    ridge: float
    explained: tuple[float, ...]
    """Per layer but the first: share of the variance that the map explains on its own text."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """See the module; layer l is at l - 1 in both lists."""

    info: LinearMapInfo
    maps: list[FloatArray]
    offsets: list[FloatArray]

    @property
    def num_bytes(self) -> int:
        """In memory."""
        return sum(each.nbytes for each in (*self.maps, *self.offsets))

    def scores(self, layer: int, state: FloatArray) -> FloatArray:
        """[E] of `layer`, given the input [H] of the MoE block before it."""
        found: FloatArray = self.maps[layer - 1] @ state + self.offsets[layer - 1]
        return found

    def for_experts(self, kept: Sequence[Sequence[int]]) -> LinearMap:
        """The map for a router that has rows for the experts `kept` only.

        Raises:
            InputError: it lacks one of them.
        """
        maps, offsets = [], []
        for layer in range(1, len(kept)):
            row_of = {expert: row for row, expert in enumerate(self.info.kept[layer])}
            missing = [expert for expert in kept[layer] if expert not in row_of]
            if missing:
                raise InputError(
                    f"the linear map knows nothing of expert {missing[0]} in MoE layer {layer}: "
                    "fit one with the whole model"
                )
            rows = [row_of[expert] for expert in kept[layer]]
            maps.append(np.ascontiguousarray(self.maps[layer - 1][rows]))
            offsets.append(self.offsets[layer - 1][rows])
        info = self.info.model_copy(update={"kept": tuple(map(tuple, kept))})
        return LinearMap(info, maps, offsets)

    def require_model(self, fingerprint: str, hidden_size: int, num_layers: int) -> None:
        """Raise InputError unless the map was fitted for this model."""
        info = self.info
        if info.model_fingerprint != fingerprint:
            raise InputError(
                f"the linear map was fitted for another model ({info.model_fingerprint[:12]}, not "
                f"{fingerprint[:12]}): fit one for this model with `edge-moe fit-guesses`"
            )
        if (info.hidden_size, len(info.kept)) != (hidden_size, num_layers):
            raise InputError(
                f"the linear map is for {len(info.kept)} MoE layers of width {info.hidden_size}, "
                f"the model has {num_layers} of width {hidden_size}: fit it again"
            )

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        arrays = {}
        for layer, (matrix, offset) in enumerate(zip(self.maps, self.offsets, strict=True), 1):
            arrays[f"map.{layer}"] = np.ascontiguousarray(matrix, np.float32)
            arrays[f"offset.{layer}"] = np.ascontiguousarray(offset, np.float32)
        with atomic_path(path) as temporary:
            save_file(arrays, temporary, metadata={_INFO_KEY: self.info.model_dump_json()})

    @classmethod
    def load(cls, path: Path) -> LinearMap:
        """Read and check what `save` wrote.

        Raises:
            InputError: missing, damaged, another version, or arrays that contradict the header.
        """
        text, arrays = read_tensor_file(path, _INFO_KEY, kind="linear map", again="fit it again")
        if text is None:
            raise InputError(f"{path} is no linear map: fit one with `edge-moe fit-guesses`")
        info = _read_info(path, text)
        layers = range(1, len(info.kept))
        names = {f"{part}.{layer}" for part in ("map", "offset") for layer in layers}
        if arrays.keys() != names:
            raise InputError(f"linear map {path} is damaged: its layers are not complete")
        for layer in layers:
            _check(path, arrays[f"map.{layer}"], (len(info.kept[layer]), info.hidden_size))
            _check(path, arrays[f"offset.{layer}"], (len(info.kept[layer]),))
        maps = [arrays[f"map.{layer}"] for layer in layers]
        return cls(info, maps, [arrays[f"offset.{layer}"] for layer in layers])


class LinearGuess(Predictor):
    """The largest scores of a linear map."""

    def __init__(
        self, states: Callable[[], FloatArray | None], linear: LinearMap, width: int
    ) -> None:
        """`states` says what the MoE block at hand is given, [H]."""
        self.name = f"linear map {width}"
        self._states = states
        self._linear = linear
        self._width = width

    def learn(self, layer: int, rows: Sequence[int]) -> None:
        """It was fitted beforehand."""

    def guess(self, layer: int, rows: Sequence[int]) -> list[int]:
        state = self._states()
        if state is None:
            return []
        return largest_logits(self._linear.scores(layer + 1, state), self._width)


def _read_info(path: Path, text: str) -> LinearMapInfo:
    try:
        raw = json.loads(text)
        found = raw.get("version") if isinstance(raw, dict) else None
        if found != LINEAR_MAP_VERSION:
            raise InputError(
                f"linear map {path} has version {found}, this edge-moe reads "
                f"{LINEAR_MAP_VERSION}: fit it again"
            )
        return LinearMapInfo.model_validate(raw)
    except (ValueError, RecursionError) as error:  # no JSON, too deeply nested, or not as above
        reason = str(error).splitlines()[0]
        raise InputError(
            f"linear map {path} has a damaged header ({reason}): fit it again"
        ) from None


def _check(path: Path, array: npt.NDArray[np.generic], shape: tuple[int, ...]) -> None:
    if array.dtype != np.float32 or array.shape != shape:
        raise InputError(
            f"linear map {path} is damaged: {array.dtype} {list(array.shape)} instead of float32 "
            f"{list(shape)}; fit it again"
        )
    if not np.isfinite(array).all():
        raise InputError(f"linear map {path} is damaged: a value is no number; fit it again")
