"""Whose kernels compute the experts: torch's, on weights unpacked to floats, or packed ones.

`exact`  torch: what transformers computes with the same weights, bit for bit where it is unpacked
`ggml`   libggml on packed weights, on a CPU; inputs are rounded as llama.cpp rounds them
`triton` Triton's on packed weights, on a CUDA device, all forms in one launch
`auto`   for the quantised experts ggml on a CPU and triton on CUDA, where they are installed;
         exact for all others

Both kinds of packed kernels are many times faster than exact.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal, get_args

from edge_moe.errors import InputError, MissingExtraError, install_command
from edge_moe.formats import split_form

if TYPE_CHECKING:
    import torch

    from edge_moe.runtime.delta_tail import DeltaTail
    from edge_moe.runtime.products import Products
    from edge_moe.runtime.slots import SlotBuffers
    from edge_moe.spec import ModelSpec

Kernels = Literal["auto", "exact", "ggml", "triton"]
PackedKernels = Literal["ggml", "triton"]

_FLOAT_TYPES = {"f32", "f16", "bf16"}
"""Experts of these alone lost nothing: `auto` keeps their results."""
_NAMES = {"ggml": "libggml", "triton": "Triton"}
_OLDEST_TRITON = (3, 7)
"""Older ones do not compile the kernels; torch's build for CUDA brings one along."""
_PACKAGES = {"ggml": ("llama-cpp-python", "gguf"), "triton": ("triton", "cuda")}


@dataclass(frozen=True)
class KernelChoice:
    """What was decided for the forms of one model."""

    packed_kernels: PackedKernels
    """Whose they are, where any forms are computed packed."""
    packed_forms: frozenset[str]
    """Experts in these are computed by them."""
    exact_forms: frozenset[str]
    """... and in these by torch."""
    warnings: list[str] = field(default_factory=list)
    is_rearranged: bool = False
    """Whether experts come from a `RearrangedStore` of the packed forms."""

    @property
    def label(self) -> str:
        """`ggml`, `ggml, rearranged`, `exact`, or `ggml; exact: bf16` where both are needed."""
        if not self.packed_forms:
            return "exact"
        packed = self.packed_kernels + (", rearranged" if self.is_rearranged else "")
        if not self.exact_forms:
            return packed
        return f"{packed}; exact: {', '.join(sorted(self.exact_forms))}"

    def new_products(
        self, spec: ModelSpec, buffers: SlotBuffers, tail: DeltaTail | None = None
    ) -> Products | None:
        """What computes packed experts in `buffers`; None where all are exact.

        Slots of quantised experts have a `tail`, if any, behind what is computed.
        """
        if not self.packed_forms:
            return None
        if self.packed_kernels == "triton":
            from edge_moe.runtime.triton_products import TritonProducts

            return TritonProducts(spec, buffers, self.packed_forms)
        from edge_moe.runtime.slot_products import SlotProducts

        return SlotProducts(
            spec, buffers, self.packed_forms, tail, is_rearranged=self.is_rearranged
        )


@dataclass(frozen=True)
class KernelChoices:
    """What was decided for all that a session computes."""

    experts: KernelChoice
    """In the slots."""
    misses: KernelChoice | None = None
    """On the CPU, where they may be computed there."""
    shadows: KernelChoice | None = None
    """Where they are asked for."""

    @property
    def warnings(self) -> list[str]:
        """Those of the slots' experts first."""
        found = [self.experts, self.misses, self.shadows]
        return [text for choice in found if choice is not None for text in choice.warnings]


def choose_kernels(kernels: Kernels, device: torch.device, forms: Iterable[str]) -> KernelChoice:
    """Decide for experts in `forms` on `device`.

    Raises:
        InputError: an unknown choice, or packed kernels on a device or for forms that they are not
            made for.
        MissingExtraError: packed kernels that are not installed.
    """
    known = frozenset(forms)
    if kernels not in get_args(Kernels):
        raise InputError(f"kernels {kernels!r} are unknown: use {', '.join(get_args(Kernels))}")
    packed: PackedKernels = "ggml" if device.type == "cpu" else "triton"
    if kernels == "exact":
        return KernelChoice(packed, frozenset(), known)
    if kernels == "auto":
        return _choose_automatically(packed, known)
    _require_device(kernels, device)
    found = _computed_forms(kernels, known)
    if known and not found:
        raise InputError(
            f"{_NAMES[kernels]} has no kernels for {', '.join(sorted(known))}: use "
            "--kernels exact, or build with other forms"
        )
    return KernelChoice(kernels, found, known - found, _unknown_warnings(kernels, known - found))


def automatic_label(forms: Iterable[str]) -> str:
    """What `auto` comes to on a CPU for experts in `forms`."""
    return _choose_automatically("ggml", frozenset(forms)).label


def _require_device(kernels: PackedKernels, device: torch.device) -> None:
    """Raise InputError unless `kernels` compute on `device`."""
    if kernels == "ggml" and device.type != "cpu":
        raise InputError(
            f"libggml's kernels compute on a CPU, not on {device.type}: add --device cpu, or "
            "use --kernels auto"
        )
    if kernels == "triton" and device.type == "cpu" and not _is_interpreted():
        raise InputError(
            "Triton's kernels compute on a CUDA device, not on a CPU: use --kernels auto (or set "
            "TRITON_INTERPRET=1, which runs them step by step in Python, for tests)"
        )


def _is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, which it decides when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _choose_automatically(packed: PackedKernels, forms: frozenset[str]) -> KernelChoice:
    """Only what is quantised, and only as far as the kernels go; says what they lack."""
    quantised = frozenset(form for form in forms if not _FLOAT_TYPES.issuperset(split_form(form)))
    if not quantised:
        return KernelChoice(packed, frozenset(), forms)
    package, extra = _PACKAGES[packed]
    try:
        found = _computed_forms(packed, quantised)
    except MissingExtraError:
        warning = (
            f"without {package} experts are unpacked to floats for every token, which is "
            f"many times slower than computing them packed: {install_command(extra)}"
        )
        return KernelChoice(packed, frozenset(), forms, [warning])
    except InputError as error:
        warning = f"experts are unpacked to floats for every token: {error}"
        return KernelChoice(packed, frozenset(), forms, [warning])
    return KernelChoice(packed, found, forms - found, _unknown_warnings(packed, quantised - found))


def _computed_forms(kernels: PackedKernels, forms: frozenset[str]) -> frozenset[str]:
    """Those of `forms` that the kernels take.

    Raises:
        MissingExtraError: they are not installed.
        InputError: a version of libggml or Triton that cannot be used.
    """
    can_compute: Callable[[str], bool]
    if kernels == "triton":
        _require_triton()
        from edge_moe.runtime.triton_products import can_compute
    else:
        from edge_moe.runtime.slot_products import can_compute
    return frozenset(form for form in forms if can_compute(form))


def _require_triton() -> None:
    """Raise MissingExtraError without triton, InputError with one that is too old."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        raise MissingExtraError("triton", "cuda", "--kernels triton") from None
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST_TRITON:
        raise InputError(
            f"triton {found} does not compile the kernels, which need 3.7 or newer: update torch "
            "together with triton, or use --kernels exact"
        )


def _unknown_warnings(kernels: PackedKernels, forms: frozenset[str]) -> list[str]:
    if not forms:
        return []
    return [
        f"{_NAMES[kernels]} has no kernels for {', '.join(sorted(forms))}: experts in these forms "
        "are unpacked to floats for every token, which is slower"
    ]
