"""A whole expert in a form: byte arithmetic, packing and unpacking of its three matrices.

A form names one type for all of an expert, `q4_k`, or the types of gate_proj, up_proj and
down_proj: `q4_k/q4_k/q6_k`. A GGUF file may also hold types that nothing here packs (`iq4_xs`,
`q5_0`, `mxfp4`, ...): such an expert can be kept as it is stored, and read.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np

from edge_moe.errors import FormError
from edge_moe.formats.base import DROP, FORM_NAMES, ByteArray, FloatArray, Form, get_form
from edge_moe.formats.dequantise import dequantise
from edge_moe.formats.ggml_types import GGML_TYPES_BY_NAME, GgmlType

_NO_WEIGHTS = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")
"""Types for activations, indices and tests: no expert is stored in them."""
STORED_NAMES = tuple(name.lower() for name in GGML_TYPES_BY_NAME if name not in _NO_WEIGHTS)
"""Types that an expert's matrix may be stored in."""
_KNOWN_NAMES = {*STORED_NAMES, *FORM_NAMES} - {DROP}
Parts = tuple[str, str, str]
"""Types of (gate_proj, up_proj, down_proj)."""


@cache
def split_form(name: str) -> Parts:
    """`q4_k` -> (q4_k, q4_k, q4_k); `q4_k/q4_k/q6_k` -> (q4_k, q4_k, q6_k). Not for `drop`.

    Raises:
        FormError: unknown, or not as `join_form` writes it.
    """
    parts = tuple(name.split("/"))
    if len(parts) == 1:
        parts *= 3
    if len(parts) != 3 or not set(parts) <= _KNOWN_NAMES or join_form(*parts) != name:
        raise FormError(
            f"form {name!r} is unknown; known forms: {', '.join(FORM_NAMES)}, other ggml types as "
            "a GGUF stores them, and three of them as gate/up/down"
        )
    return parts[0], parts[1], parts[2]


def join_form(gate: str, up: str, down: str) -> str:
    """The name of the form with these types."""
    return gate if gate == up == down else f"{gate}/{up}/{down}"


def is_form(name: str) -> bool:
    """Whether `name` is `drop` or what `split_form` understands."""
    if name == DROP:
        return True
    try:
        split_form(name)
    except FormError:
        return False
    return True


def form_bits(name: str) -> float:
    """Bits per weight, the mean over the three matrices, which hold equally many; 0 for `drop`."""
    if name == DROP:
        return 0.0
    return sum(_type(part).bits_per_weight for part in split_form(name)) / 3


def least_bits(name: str) -> float:
    """Bits per weight of the matrix that has the fewest; 0 for `drop`."""
    if name == DROP:
        return 0.0
    return min(_type(part).bits_per_weight for part in split_form(name))


def form_label(name: str) -> str:
    """For people: `dropped`, `4-bit`, `4-bit, down 6-bit`, `4.2-bit` for types of a GGUF."""
    if name == DROP:
        return "dropped"
    gate, up, down = (_part_label(part) for part in split_form(name))
    if gate == up == down:
        return gate
    return f"{gate}, down {down}" if gate == up else f"gate {gate}, up {up}, down {down}"


def in_order(forms: Iterable[str]) -> list[str]:
    """Each of `forms` once, from fewest to most bits; `drop` first."""
    known = {name: rank for rank, name in enumerate(FORM_NAMES)}
    return sorted(set(forms), key=lambda name: (form_bits(name), known.get(name, 0), name))


def form_fits(name: str, hidden_size: int, expert_width: int, has_gate: bool = True) -> bool:
    """Whether the rows of an expert's matrices are whole blocks of the form's types."""
    if name == DROP:
        return True
    gate, up, down = (_type(part).block_size for part in split_form(name))
    gate_fits = not has_gate or hidden_size % gate == 0
    return gate_fits and hidden_size % up == 0 and expert_width % down == 0


def expert_packed_bytes(
    name: str, hidden_size: int, expert_width: int, has_gate: bool = True
) -> tuple[int, int, int]:
    """Bytes of (gate_proj [I, H], up_proj [I, H], down_proj [H, I]) in form `name`.

    Experts without a gate have a gate_proj of no rows.
    """
    if name == DROP:
        return 0, 0, 0
    gate, up, down = (_type(part) for part in split_form(name))
    return (
        expert_width * gate.row_bytes(hidden_size) if has_gate else 0,
        expert_width * up.row_bytes(hidden_size),
        hidden_size * down.row_bytes(expert_width),
    )


def expert_bytes(name: str, hidden_size: int, expert_width: int, has_gate: bool = True) -> int:
    """Bytes of one whole expert in form `name`."""
    return sum(expert_packed_bytes(name, hidden_size, expert_width, has_gate))


def pack_expert(name: str, gate: FloatArray, up: FloatArray, down: FloatArray) -> ByteArray:
    """One expert as flat bytes: packed gate_proj rows, then up_proj rows, then down_proj rows.

    Raises:
        FormError: a type that is only kept as stored.
    """
    parts = zip(split_form(name), (gate, up, down), strict=True)
    return np.concatenate([get_form(part).pack(matrix).reshape(-1) for part, matrix in parts])


def unpack_expert(
    name: str, record: ByteArray, hidden_size: int, expert_width: int, has_gate: bool = True
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Inverse of `pack_expert`: (gate_proj [I, H], up_proj [I, H], down_proj [H, I]).

    Raises:
        FormError: `record` has another length than the form implies.
        MissingExtraError: a type that only the extra `gguf` reads.
    """
    sizes = expert_packed_bytes(name, hidden_size, expert_width, has_gate)
    if record.size != sum(sizes):
        raise FormError(f"an expert in form {name} takes {sum(sizes)} bytes, found {record.size}")
    pieces = np.split(record, np.cumsum(sizes)[:-1])
    up, down = (expert_width, hidden_size), (hidden_size, expert_width)
    gate = up if has_gate else (0, hidden_size)
    matrices = [
        _unpack(part, piece, shape)
        for part, piece, shape in zip(split_form(name), pieces, (gate, up, down), strict=True)
    ]
    return matrices[0], matrices[1], matrices[2]


def _unpack(part: str, piece: ByteArray, shape: tuple[int, int]) -> FloatArray:
    if not shape[0]:
        return np.empty(shape, np.float32)
    if part in FORM_NAMES:
        return get_form(part).unpack(piece.reshape(shape[0], -1), shape[1])
    return dequantise(part.upper(), piece.tobytes(), shape[0] * shape[1]).reshape(shape)


def _type(part: str) -> GgmlType | Form:
    known = GGML_TYPES_BY_NAME.get(part.upper())
    return get_form(part) if known is None else known


def _part_label(part: str) -> str:
    return get_form(part).label if part in FORM_NAMES else f"{_type(part).bits_per_weight:.2g}-bit"
