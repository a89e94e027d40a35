"""`LinearMap`: what a layer's input says of the next layer's router, fitted once on text.

A safetensors file. H hidden_size, E_l experts of MoE layer l; for every layer but the first:

    map.LAYER     float32 [E_l, H]  times the input of the MoE block before it
    offset.LAYER  float32 [E_l]     plus this: what the router of LAYER ranks its experts by
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_moe.runtime.fitted_file import FittedInfo, FittedKind
from edge_moe.runtime.predictors import Predictor, largest_logits

LINEAR_MAP_VERSION = 1
_KIND = FittedKind("linear map", "edge_moe_linear_map", "edge-moe fit-guesses", LINEAR_MAP_VERSION)

FloatArray = npt.NDArray[np.float32]


class LinearMapInfo(FittedInfo):
    """What a map belongs to, and how it was fitted."""

    version: int = LINEAR_MAP_VERSION
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
            rows = _KIND.rows_of(self.info, layer, kept[layer])
            maps.append(np.ascontiguousarray(self.maps[layer - 1][rows]))
            offsets.append(self.offsets[layer - 1][rows])
        info = self.info.model_copy(update={"kept": tuple(map(tuple, kept))})
        return LinearMap(info, maps, offsets)

    def require_model(self, fingerprint: str, hidden_size: int, num_layers: int) -> None:
        """Raise InputError unless the map was fitted for this model."""
        _KIND.require_model(self.info, fingerprint, hidden_size, num_layers)

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        arrays: dict[str, FloatArray] = {}
        for layer, (matrix, offset) in enumerate(zip(self.maps, self.offsets, strict=True), 1):
            arrays |= {f"map.{layer}": matrix, f"offset.{layer}": offset}
        _KIND.write(path, self.info, arrays)

    @classmethod
    def load(cls, path: Path) -> LinearMap:
        """Read and check what `save` wrote.

        Raises:
            InputError: missing, damaged, another version, or arrays that contradict the header.
        """
        info, arrays = _KIND.read(path, LinearMapInfo)
        layers = range(1, len(info.kept))
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in layers:
            shapes[f"map.{layer}"] = (len(info.kept[layer]), info.hidden_size)
            shapes[f"offset.{layer}"] = (len(info.kept[layer]),)
        _KIND.check_arrays(path, arrays, shapes)
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
