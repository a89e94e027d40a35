"""The matrices of a packed expert that libggml multiplies with, and where each lies in its record.

Letters: H hidden_size, I expert_width.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_moe.formats import expert_packed_bytes, split_form
from edge_moe.formats.ggml_types import GGML_TYPES_BY_NAME, GgmlType
from edge_moe.spec import ModelSpec


@dataclass(frozen=True)
class ExpertMatrix:
    """[rows, width] of one ggml type."""

    kind: GgmlType
    rows: int
    width: int
    offset_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.rows * self.kind.row_bytes(self.width)


def expert_matrices(form: str, spec: ModelSpec) -> list[ExpertMatrix]:
    """gate_proj and up_proj, as one matrix where their types agree, and down_proj.

    `form` is of ggml's types throughout. Without a gate up_proj is the first of two.
    """
    hidden, width, has_gate = spec.expert_shape
    gate_bytes, up_bytes, _ = expert_packed_bytes(form, hidden, width, has_gate)
    gate, up, down = (GGML_TYPES_BY_NAME[part.upper()] for part in split_form(form))
    last = ExpertMatrix(down, hidden, width, gate_bytes + up_bytes)
    if gate == up or not has_gate:
        return [ExpertMatrix(up, spec.inner_rows, hidden, 0), last]
    return [ExpertMatrix(gate, width, hidden, 0), ExpertMatrix(up, width, hidden, gate_bytes), last]
