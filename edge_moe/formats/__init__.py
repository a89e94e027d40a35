"""Storage forms of an expert. A pruned expert is an expert at zero bits: `drop` is a form too.

Most packed forms are ggml block layouts, so the native package, GGUF files and kernels share one
family; `int2_*`, `int4_*` and `int8_row` are those of ONNX Runtime. A form packs along rows:
gate_proj and up_proj have rows of hidden_size weights, down_proj has rows of expert_width weights,
and both widths must be multiples of the form's block.
"""

from edge_moe.formats.base import DROP, EXACT, FORM_NAMES, Form, get_form
from edge_moe.formats.experts import (
    STORED_NAMES,
    expert_bytes,
    expert_packed_bytes,
    form_bits,
    form_fits,
    form_label,
    in_order,
    is_form,
    join_form,
    least_bits,
    pack_expert,
    split_form,
    unpack_expert,
)

__all__ = [
    "DROP",
    "EXACT",
    "FORM_NAMES",
    "STORED_NAMES",
    "Form",
    "expert_bytes",
    "expert_packed_bytes",
    "form_bits",
    "form_fits",
    "form_label",
    "get_form",
    "in_order",
    "is_form",
    "join_form",
    "least_bits",
    "pack_expert",
    "split_form",
    "unpack_expert",
]
