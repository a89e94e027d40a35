"""Rotary tables, computed as transformers does from a model's configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_moe.errors import TargetError

_FIXED_TYPES = ("linear", "yarn", "llama3", "proportional")
"""Kinds of scaling that do not hang on the length of a text."""


@dataclass(frozen=True)
class Rotary:
    """Inverse frequencies [width / 2], and the factor on cosines and sines."""

    frequencies: npt.NDArray[np.float32]
    factor: float

    @property
    def width(self) -> int:
        return 2 * len(self.frequencies)

    def rows(
        self, function: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
    ) -> Callable[[int, int], npt.NDArray[np.float32]]:
        """`function` (cosine or sine) of the angles at positions start..end, [n, width / 2]."""

        def make(start: int, end: int) -> npt.NDArray[np.float32]:
            positions = np.arange(start, end, dtype=np.float32)
            angles = positions[:, None] * self.frequencies
            return (function(angles) * np.float32(self.factor)).astype(np.float32)

        return make


def read_rotary(config: Any, head_width: int, layer_type: str = "") -> Rotary:
    """The rotary embedding of a transformers `config` with heads of `head_width`.

    `layer_type` is that of the layer where config.json has parameters for each.

    Raises:
        TargetError: its kind of scaling changes with the length of the text.
    """
    parameters = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        width = int(head_width * parameters.get("partial_rotary_factor", 1.0))
        exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        base = np.float32(parameters["rope_theta"])
        return Rotary((1.0 / base**exponents).astype(np.float32), 1.0)
    if kind not in _FIXED_TYPES and not _is_fixed(config, parameters):
        raise TargetError(
            f"target onnx: rope_type {kind!r} changes with the length of the text, which one graph "
            "cannot hold: use --target native"
        )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](
        config, device="cpu", layer_type=layer_type or None
    )
    factor = parameters.get("short_mscale", factor)
    return Rotary(frequencies.float().numpy(), float(factor))


def _is_fixed(config: Any, parameters: Mapping[str, Any]) -> bool:
    """Phi's own longrope, if it scales cosines of long texts as those of short ones.

    transformers' phimoe divides frequencies by `short_factor` in texts of any length; the model's
    authors take `long_factor` beyond `original_max_position_embeddings`.
    """
    short, long = (parameters.get(f"{name}_mscale") for name in ("short", "long"))
    if short is None:
        return False
    limit = parameters["original_max_position_embeddings"]
    return bool(short == long or config.max_position_embeddings <= limit)
