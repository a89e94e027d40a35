"""Ternary shadows: a second, tiny copy of every expert that computes while its body is on disk.

A shadow is packed from the original weights and lies in the package beside the body. An expert
whose body takes no more bytes than the shadow would is its own shadow: it has no other copy, and
stays in memory wherever shadows do. So a task-pruned expert that is kept as a shadow is an expert
in a ternary form.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_moe.errors import FormError, InputError
from edge_moe.formats import DROP, expert_bytes, form_fits
from edge_moe.plan import Plan
from edge_moe.spec import ModelSpec

SHADOW_FORMS = ("tq2_0", "tq1_0", "q2_0")
"""2.06, 1.69 and 2.25 bits per weight. tq2_0 computes fastest; q2_0 packs rows of 64 weights, the
others rows of 256."""


def check_shadow(form: str, spec: ModelSpec) -> None:
    """Refuse a form that is no shadow, or that does not fit the model's rows.

    Raises:
        InputError, FormError: names the form and what to use.
    """
    if form not in SHADOW_FORMS:
        raise InputError(f"{form!r} is no form of a shadow: use one of {', '.join(SHADOW_FORMS)}")
    if not form_fits(form, *spec.expert_shape):
        hidden_size, expert_width, _ = spec.expert_shape
        raise FormError(
            f"shadow form {form} does not fit experts of {hidden_size} x {expert_width} weights: "
            "tq2_0 and tq1_0 take rows of a multiple of 256, q2_0 of 64"
        )


def needs_shadow(form: str, shadow: str, spec: ModelSpec) -> bool:
    """Whether an expert that is kept in `form` gets a record in the form `shadow`, too."""
    if form == DROP or not shadow:
        return False
    return expert_bytes(form, *spec.expert_shape) > expert_bytes(shadow, *spec.expert_shape)


def shadow_bytes(forms: Sequence[Sequence[str]], shadow: str, spec: ModelSpec) -> int:
    """Bytes of the shadow records of experts in `forms` [L][E]: on disk, and in memory."""
    if not shadow:
        return 0
    one_bytes = expert_bytes(shadow, *spec.expert_shape)
    return one_bytes * sum(needs_shadow(form, shadow, spec) for row in forms for form in row)


def with_shadow(plan: Plan, shadow: str, spec: ModelSpec) -> Plan:
    """`plan`, whose package will hold shadows.

    Its bill is not changed: while every body is in memory, as it says, no shadow is.

    Raises:
        InputError, FormError: as `check_shadow`.
    """
    check_shadow(shadow, spec)
    changes = {"shadow": shadow, "shadow_bytes": shadow_bytes(plan.forms, shadow, spec)}
    return plan.model_copy(update=changes)
