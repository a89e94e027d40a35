"""Experts that no MoE node of onnxruntime computes on a CPU: a branch of the graph each.

So it is with a gated GELU. The branch of an expert holds a MatMulNBits node per matrix; numbers
here are measured with onnxruntime 1.32 on one core.
"""

from __future__ import annotations

from edge_moe.formats.base import DROP, FORM_NAMES
from edge_moe.formats.integers import SCALE_BYTES, integer_form
from edge_moe.spec import ModelSpec

GATED_GELUS = {"gelu_pytorch_tanh": "tanh", "gelu": "none"}
"""transformers' names -> ONNX's for the approximation."""
BRANCH_BYTES = 150_000
"""What onnxruntime holds of a branch besides weights. It takes 2 ms to load, and 5 microseconds of
every token."""
_BLOCK_SIZES = (256, 128, 64, 32, 16)
"""Of MatMulNBits, which knows no scale for a whole row."""
_ROW_COPIES = 3
"""Scales of such blocks: one as it is read, one packed, and sums of codes."""


def has_branches(spec: ModelSpec) -> bool:
    """Whether target onnx computes the experts of a model so."""
    return not spec.is_gguf and spec.has_gate and spec.hidden_act in GATED_GELUS


def row_block_size(width: int) -> int | None:
    """The largest block that rows of `width` codes divide into; None where none does."""
    return next((size for size in _BLOCK_SIZES if width % size == 0), None)


def row_problem(spec: ModelSpec, form: str) -> str | None:
    """Why no branch can read experts of `spec` in `form`; None where it can."""
    kind = integer_form(form) if has_branches(spec) else None
    widths = spec.expert_hidden, spec.expert_width
    if kind is None or not kind.row_blocks or all(map(row_block_size, widths)):
        return None
    return (
        f"a branch reads {form} in blocks of {_BLOCK_SIZES[-1]} or more; expert rows are "
        f"{widths[0]} and {widths[1]}"
    )


def branch_bytes(form: str, hidden_size: int, expert_width: int) -> int:
    """Bytes of memory that a branch takes beyond the expert's in `form`."""
    if form == DROP or form not in FORM_NAMES:
        return 0
    kind = integer_form(form)
    if kind is None:
        return BRANCH_BYTES
    num_weights = 3 * hidden_size * expert_width
    if not kind.row_blocks:
        return BRANCH_BYTES + num_weights // kind.block_size * SCALE_BYTES
    inner, outer = (row_block_size(width) or 1 for width in (hidden_size, expert_width))
    blocks = num_weights * 2 // 3 // inner + num_weights // 3 // outer
    return BRANCH_BYTES + blocks * _ROW_COPIES * SCALE_BYTES
