"""Whose kernels compute the experts: torch's, on weights unpacked to float32, or libggml's.

`exact`  torch: what transformers computes with the same weights, bit for bit where it is unpacked
`ggml`   libggml on packed weights, many times faster; inputs are rounded as llama.cpp rounds them
`auto`   ggml for the quantised experts on a CPU where it is installed, exact for all others
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from edge_moe.errors import InputError, MissingExtraError, install_command
from edge_moe.formats import split_form

if TYPE_CHECKING:
    import torch

Kernels = Literal["auto", "exact", "ggml"]

_FLOAT_TYPES = {"f32", "f16", "bf16"}
"""Experts of these alone lost nothing: `auto` keeps their results."""


@dataclass(frozen=True)
class KernelChoice:
    """What was decided for the forms of one model."""

    ggml_forms: frozenset[str]
    """Experts in these are computed by libggml."""
    exact_forms: frozenset[str]
    """... and in these by torch."""
    warnings: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """`ggml`, `exact`, or `ggml; exact: bf16` where both are needed."""
        if not self.ggml_forms:
            return "exact"
        if not self.exact_forms:
            return "ggml"
        return f"ggml; exact: {', '.join(sorted(self.exact_forms))}"


def choose_kernels(kernels: Kernels, device: torch.device, forms: Iterable[str]) -> KernelChoice:
    """Decide for experts in `forms` on `device`.

    Raises:
        InputError: an unknown choice, or ggml on a device or for forms that it has no kernels for.
        MissingExtraError: ggml, and llama-cpp-python is not installed.
    """
    known = frozenset(forms)
    if kernels not in get_args(Kernels):
        raise InputError(f"kernels {kernels!r} are unknown: use {', '.join(get_args(Kernels))}")
    if kernels == "exact":
        return KernelChoice(frozenset(), known)
    if device.type != "cpu":
        if kernels == "ggml":
            raise InputError(
                f"libggml's kernels compute on a CPU, not on {device.type}: add --device cpu, or "
                "use --kernels auto"
            )
        return KernelChoice(frozenset(), known)
    if kernels == "auto":
        return _choose_automatically(known)
    found = _ggml_forms(known)
    if known and not found:
        raise InputError(
            f"libggml has no kernels for {', '.join(sorted(known))}: use --kernels exact, or build "
            "with other forms"
        )
    return KernelChoice(found, known - found, _unknown_warnings(known - found))


def _choose_automatically(forms: frozenset[str]) -> KernelChoice:
    """Only what is quantised, and only as far as the library goes; says what it lacks."""
    quantised = frozenset(form for form in forms if not _FLOAT_TYPES.issuperset(split_form(form)))
    if not quantised:
        return KernelChoice(frozenset(), forms)
    try:
        found = _ggml_forms(quantised)
    except MissingExtraError:
        warning = (
            "without llama-cpp-python experts are unpacked to float32 for every token, which is "
            f"many times slower than computing them packed: {install_command('gguf')}"
        )
        return KernelChoice(frozenset(), forms, [warning])
    except InputError as error:
        return KernelChoice(
            frozenset(), forms, [f"experts are unpacked to float32 for every token: {error}"]
        )
    return KernelChoice(found, forms - found, _unknown_warnings(quantised - found))


def _ggml_forms(forms: frozenset[str]) -> frozenset[str]:
    from edge_moe.runtime.slot_products import can_compute

    return frozenset(form for form in forms if can_compute(form))


def _unknown_warnings(forms: frozenset[str]) -> list[str]:
    if not forms:
        return []
    return [
        f"libggml has no kernels for {', '.join(sorted(forms))}: experts in these forms are "
        "unpacked to float32 for every token, which is slower"
    ]
