"""The `Form` interface, its registry, and byte arithmetic. Implementations register themselves."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from edge_moe.errors import FormError

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

DROP = "drop"
"""The form of a pruned expert: zero bytes, no router row."""
EXACT = "f32"
"""The form that holds the weights of every checkpoint without loss."""

# name -> module that implements it; the order is from fewest to most bits
_MODULES = {
    "tq1_0": "edge_moe.formats.ternary",
    "tq2_0": "edge_moe.formats.ternary",
    "q2_0": "edge_moe.formats.ternary",
    "int2_b64": "edge_moe.formats.integers",
    "q2_k": "edge_moe.formats.k_quants",
    "int2_b32": "edge_moe.formats.integers",
    "q3_k": "edge_moe.formats.k_quants",
    "q4_0": "edge_moe.formats.grouped",
    "q4_k": "edge_moe.formats.k_quants",
    "int4_b64": "edge_moe.formats.integers",
    "int4_b32": "edge_moe.formats.integers",
    "q5_k": "edge_moe.formats.k_quants",
    "q6_k": "edge_moe.formats.k_quants",
    "int8_row": "edge_moe.formats.integers",
    "q8_0": "edge_moe.formats.grouped",
    "f16": "edge_moe.formats.floats",
    "bf16": "edge_moe.formats.floats",
    "f32": "edge_moe.formats.floats",
}
FORM_NAMES = (DROP, *_MODULES)


class Form(ABC):
    """One packed weight format. Subclasses set the class variables and two methods.

    Subclassing with `name=` registers the form.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    """For people: `ternary`, `4-bit`, ..."""
    ggml_type: ClassVar[int | None]
    """Number of the type in ggml, as written to GGUF files; None where ggml has no such type."""
    block_size: ClassVar[int]
    """Weights per block; rows must be a multiple of it."""
    block_bytes: ClassVar[int]

    @property
    def bits_per_weight(self) -> float:
        return self.block_bytes * 8 / self.block_size

    def row_bytes(self, width: int) -> int:
        """Packed bytes of a row of `width` weights.

        Raises:
            FormError: `width` is not a multiple of the block.
        """
        if width % self.block_size:
            raise FormError(
                f"form {self.name} packs blocks of {self.block_size} weights; "
                f"a row of {width} is not a multiple"
            )
        return width // self.block_size * self.block_bytes

    @abstractmethod
    def pack(self, weights: FloatArray) -> ByteArray:
        """[..., width] float32 -> [..., row_bytes(width)] uint8."""

    @abstractmethod
    def unpack(self, packed: ByteArray, width: int) -> FloatArray:
        """[..., row_bytes(width)] uint8 -> [..., width] float32."""


_REGISTRY: dict[str, Form] = {}


def register(form: type[Form]) -> type[Form]:
    """Class decorator: make `form` available to `get_form`."""
    if form.name in _REGISTRY:
        raise ValueError(f"form {form.name} is registered twice")
    _REGISTRY[form.name] = form()
    return form


def get_form(name: str) -> Form:
    """The packed form called `name` (not `drop`, which packs nothing).

    Raises:
        FormError: unknown name, with the known ones.
    """
    if name not in _REGISTRY:
        if name not in _MODULES:
            raise FormError(f"form {name!r} is unknown; known forms: {', '.join(FORM_NAMES)}")
        importlib.import_module(_MODULES[name])
    return _REGISTRY[name]
