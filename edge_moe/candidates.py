"""Which forms an expert may take: one per class of bits, where shapes and the target allow it."""

from __future__ import annotations

from dataclasses import dataclass

from edge_moe.errors import TargetError
from edge_moe.formats import DROP, expert_bytes, form_fits, get_form
from edge_moe.gguf_arch import GGUF_ARCHS
from edge_moe.plan import Device, Target
from edge_moe.problem import FormScope
from edge_moe.spec import ModelSpec

SOURCE_FORMS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
"""Checkpoint dtype -> the form that stores it without loss."""

_CLASSES = {
    "ternary": ("tq1_0",),
    "2-bit": ("q2_k", "q2_0"),
    "3-bit": ("q3_k",),
    "4-bit": ("q4_k", "q4_0"),
    "5-bit": ("q5_k",),
    "6-bit": ("q6_k",),
    "8-bit": ("q8_0",),
}
"""Class -> forms, preferred first; the first that fits the shapes is the candidate."""
_LLAMA_CPU_ONLY = ("tq1_0", "tq2_0")


@dataclass(frozen=True)
class TargetRules:
    """What a target can express."""

    scope: FormScope
    """Which experts share a form; see `edge_moe.problem.Problem`."""
    classes: tuple[str, ...]
    """Classes of bits offered besides `drop` and 16 bits."""
    limits: tuple[str, ...] = ()
    """What it cannot express, in sentences."""


TARGET_RULES: dict[Target, TargetRules] = {
    "native": TargetRules(scope="expert", classes=tuple(_CLASSES)),
    "gguf": TargetRules(
        scope="layer",
        classes=tuple(_CLASSES),
        limits=(
            "GGUF holds one expert count for the whole model: every layer keeps the same number.",
            "GGUF stores the experts of a layer in one tensor per projection: "
            "they share one form per layer.",
        ),
    ),
    "hf": TargetRules(
        scope="model",
        classes=(),
        limits=(
            "Hugging Face safetensors holds one expert count for the whole model: "
            "every layer keeps the same number.",
            "Hugging Face safetensors is written in the checkpoint's own dtype: "
            "experts are kept whole or dropped, never quantised.",
        ),
    ),
    "onnx": TargetRules(
        scope="model",
        classes=("4-bit", "8-bit"),
        limits=(
            "ONNX export keeps the same number of experts in every layer.",
            "onnxruntime's QMoE is planned with one width for the whole model, 4, 8 or 16 bits.",
            "Losses for ONNX are those of ggml forms of the same width: QMoE rounds differently.",
            "`build` cannot write ONNX yet: this plan only shows what it would take.",
        ),
    ),
}


@dataclass(frozen=True)
class Candidates:
    """The forms on offer, and what is missing."""

    forms: tuple[str, ...]
    """`drop` first, then ascending in bytes; the last is 16-bit (for hf: the checkpoint's own).
    A GGUF model has no 16-bit one: its layers may stay as they are stored, see `edge_moe.offer`."""
    limits: tuple[str, ...]
    """What the target or the shapes rule out, in sentences."""


def candidate_forms(spec: ModelSpec, target: Target, device: Device = "cpu") -> tuple[str, ...]:
    """`drop`, then one form per class of bits that fits, then 16 bits.

    Raises:
        TargetError: the target cannot hold this architecture at all.
    """
    return find_candidates(spec, target, device).forms


def full_expert_bytes(spec: ModelSpec, target: Target) -> int:
    """All experts in the target's largest form."""
    largest = expert_bytes(candidate_forms(spec, target)[-1], *spec.expert_shape)
    return spec.num_moe_layers * spec.num_experts * largest


def least_expert_bytes(spec: ModelSpec, target: Target) -> int:
    """No plan takes fewer bytes: top_k experts per layer in the target's smallest form."""
    smallest = candidate_forms(spec, target)[1]
    one_bytes = expert_bytes(smallest, *spec.expert_shape)
    return spec.num_moe_layers * spec.top_k * one_bytes


def find_candidates(spec: ModelSpec, target: Target, device: Device = "cpu") -> Candidates:
    """The forms on offer for `target`, with a sentence for everything that is not.

    Raises:
        TargetError: the target cannot hold this architecture at all.
    """
    check_target(spec, target)
    rules = TARGET_RULES[target]
    forms, limits = [DROP], list(rules.limits)
    if target == "gguf" and not spec.is_gguf:
        limits += spec.family.gguf_limits
    for name in rules.classes:
        form, sentences = _pick(spec, name)
        limits += sentences
        if form in _LLAMA_CPU_ONLY and target == "gguf":
            limits.append(_llama_sentence(device))
            form = form if device == "cpu" else None
        if form is not None:
            forms.append(form)
    if not spec.is_gguf:  # whose layers may be kept as they are stored, and never grow
        forms.append(_widest(spec, target))
    return Candidates(tuple(forms), tuple(limits))


def check_target(spec: ModelSpec, target: Target) -> None:
    """Refuse a target that cannot hold this architecture.

    Raises:
        TargetError: names the architecture, the reason and a target that works.
    """
    if spec.is_gguf:
        if target != "gguf":
            raise TargetError(
                f"a GGUF model can only be built as GGUF, not as {target}: use --target gguf, or "
                "give the Hugging Face folder that it was made from"
            )
        return
    reason = gguf_reason(spec) if target == "gguf" else None
    if reason is not None:
        raise TargetError(f"target gguf: {reason}: use --target native")


def gguf_reason(spec: ModelSpec) -> str | None:
    """Why llama.cpp cannot run this architecture, or this router; None where it can.

    What only config.json's other values or the tokenizer rule out, `build` says.
    """
    if spec.is_gguf:
        return None
    family, router = spec.family, spec.router
    if family.gguf_arch is None:
        return family.gguf_reason or f"llama.cpp has no architecture for {spec.model_type!r}"
    arch, name = GGUF_ARCHS[family.gguf_arch], f"llama.cpp's {family.gguf_arch}"
    if arch.renormalises not in (None, router.renormalises):
        return (
            f"{name} always has norm_topk_prob={arch.renormalises}, this checkpoint has "
            f"{router.renormalises}"
        )
    if not arch.reads_scale and router.scale != 1.0:
        return f"{name} has no routed_scaling_factor={router.scale:g}"
    if not (arch.reads_gating or arch.score == router.score_function):
        return f"{name} scores experts by {arch.score}, this model by {router.score_function}"
    if router.num_groups > router.top_groups and router.group_score != "best two":
        return (
            f"{name} ranks groups of experts by their two best scores, this checkpoint by the best"
        )
    return None


def _pick(spec: ModelSpec, class_name: str) -> tuple[str | None, list[str]]:
    """(the class's first form that fits or None, a sentence if it is not the preferred one)."""
    preferred, *_ = names = _CLASSES[class_name]
    widths = spec.expert_shape
    chosen = next((name for name in names if form_fits(name, *widths)), None)
    if chosen == preferred:
        return chosen, []
    instead = f"{class_name} is stored as {chosen}" if chosen else "not offered"
    sentence = (
        f"{preferred} packs rows of {get_form(preferred).block_size}; "
        f"expert rows are {widths[0]} and {widths[1]}: {instead}."
    )
    return chosen, [sentence]


def _llama_sentence(device: Device) -> str:
    fact = "llama.cpp has no CUDA kernel for TQ1_0/TQ2_0"
    return f"{fact}: runs on CPU." if device == "cpu" else f"{fact}: ternary is not offered."


def _widest(spec: ModelSpec, target: Target) -> str:
    source_form = SOURCE_FORMS[spec.dtype]
    if target == "hf" or source_form == "bf16":
        return source_form
    return "f16"
