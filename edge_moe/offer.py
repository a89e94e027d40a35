"""What a plan may choose from, given the model it is made from.

A Hugging Face checkpoint loses nothing in its own dtype, and every layer may take every form. A
GGUF model is quantised already: a layer loses nothing as it is stored, and may take only forms that
are smaller than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_moe.candidates import GGUF_MIXES, SOURCE_FORMS, TARGET_RULES, find_candidates
from edge_moe.errors import StatsError
from edge_moe.formats import DROP, EXACT, expert_bytes, in_order, join_form
from edge_moe.gguf_model import GgufModel
from edge_moe.plan import Device, Target
from edge_moe.problem import BoolArray
from edge_moe.source_model import SourceModel
from edge_moe.spec import ModelSpec


@dataclass(frozen=True, eq=False)
class Offer:
    """Forms on offer, and everything that is ruled out."""

    forms: tuple[str, ...]
    """`drop` first, then ascending in bytes."""
    stored: tuple[str, ...]
    """[L] the form in which a layer loses nothing."""
    allowed: BoolArray
    """[L, F]"""
    limits: tuple[str, ...]
    """In sentences."""


def find_offer(
    source: SourceModel, measured: Sequence[str], target: Target, device: Device
) -> Offer:
    """Forms whose loss is among `measured` or that are lossless: `drop`, and something to keep.

    Raises:
        StatsError: too little was measured.
        TargetError: the target cannot hold this architecture.
    """
    spec = source.spec
    candidates = find_candidates(spec, target, device, measured)
    stored = stored_forms(source)
    lossless = {*stored, EXACT}
    offered = [form for form in candidates.forms if form in measured or form in lossless]
    if spec.is_gguf:
        every = in_order({*offered, *stored})
        offered = sorted(every, key=lambda form: _bytes(spec, form))  # stable: ties by bits
    if DROP not in measured or len(offered) < 2:
        raise StatsError(
            f"the statistics hold losses for {', '.join(measured) or 'no form'}; "
            f"target {target} needs {DROP} and one of {', '.join(candidates.forms[1:])}: "
            f"calibrate again{'' if spec.is_gguf else f' with --target {target}'}"
        )

    def may_take(form: str, own: str, known: Sequence[str]) -> bool:
        """Whether a layer that is stored in the form `own` may take `form`."""
        if not spec.is_gguf or form == own:
            return True
        return form in known and _bytes(spec, form) < _bytes(spec, own)

    allowed = np.array([[may_take(form, own, measured) for form in offered] for own in stored])
    unmeasured = [
        form
        for form in candidates.forms
        if form not in (*measured, *lossless)
        and any(may_take(form, own, candidates.forms) for own in stored)
    ]
    used = np.flatnonzero(allowed.any(axis=0))
    limits = (
        *candidates.limits,
        *_unmeasured_limits(unmeasured),
        *_unheld_limits(measured, target),
    )
    return Offer(tuple(offered[index] for index in used), stored, allowed[:, used], limits)


def _unheld_limits(measured: Sequence[str], target: Target) -> list[str]:
    """A sentence about forms that were measured for nothing, where the target quantises at all."""
    packed = TARGET_RULES[target].packed_forms
    held = {DROP, EXACT, *GGUF_MIXES, *packed}
    missing = ", ".join(form for form in measured if form not in held)
    if not packed or not missing:
        return []
    return [f"Measured, but not held by target {target}, and so not offered: {missing}."]


def _unmeasured_limits(forms: Sequence[str]) -> list[str]:
    """One sentence per form, and one for all mixes of forms."""
    mixes = [form for form in forms if form in GGUF_MIXES]
    limits = [
        f"{form} was not measured in this calibration: not offered."
        for form in forms
        if form not in mixes
    ]
    if mixes:
        limits.append(
            f"Mixes of types in one layer ({', '.join(mixes)} for gate/up/down) were not measured "
            "in this calibration: not offered. `edge-moe calibrate --target gguf` measures them."
        )
    return limits


def stored_forms(source: SourceModel) -> tuple[str, ...]:
    """[L] the form in which each MoE layer's experts are stored."""
    spec = source.spec
    if isinstance(source, GgufModel):
        return tuple(join_form(*source.stored_types(layer)) for layer in spec.moe_layer_ids)
    return (SOURCE_FORMS[spec.dtype],) * spec.num_moe_layers


def gguf_forms(source: GgufModel, device: Device = "cpu") -> tuple[str, ...]:
    """Forms that a calibration may measure: `drop`, and those smaller than what is stored."""
    candidates = find_candidates(source.spec, "gguf", device)
    largest = max(_bytes(source.spec, form) for form in stored_forms(source))
    return tuple(form for form in candidates.forms if _bytes(source.spec, form) < largest)


def _bytes(spec: ModelSpec, form: str) -> int:
    return expert_bytes(form, *spec.expert_shape)
