"""Which forms an expert may take, where shapes and the target allow it.

One per class of bits, or those of a class that were measured.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from edge_moe.errors import TargetError
from edge_moe.formats import DROP, EXACT, expert_bytes, form_fits, get_form, split_form
from edge_moe.gguf_arch import GGUF_ARCHS
from edge_moe.onnx_branches import BRANCH_BYTES, GATED_GELUS, has_branches, row_problem
from edge_moe.plan import Device, Target
from edge_moe.problem import FormScope
from edge_moe.spec import ModelSpec

SOURCE_FORMS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
"""Checkpoint dtype -> the form that stores it without loss."""

_Classes = Mapping[str, tuple[str, ...]]
_GGML_CLASSES: _Classes = {
    "ternary": ("tq1_0", "tq2_0"),
    "2-bit": ("q2_k", "q2_0"),
    "3-bit": ("q3_k",),
    "4-bit": ("q4_k", "q4_0"),
    "5-bit": ("q5_k",),
    "6-bit": ("q6_k",),
    "8-bit": ("q8_0",),
}
"""Class -> forms, preferred first; the first that fits the shapes is the candidate, unless others
of them were measured."""
_QMOE_CLASSES: _Classes = {
    "2-bit": ("int2_b64", "int2_b32"),
    "4-bit": ("int4_b64", "int4_b32"),
    "8-bit": ("int8_row",),
}
ONNX_FAMILIES = (
    "qwen3_moe",
    "qwen2_moe",
    "olmoe",
    "mixtral",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "glm4_moe_lite",
    "minimax_m2",
    "lfm2_moe",
    "qwen3_next",
    "qwen3_5_moe_text",
    "nemotron_h",
    "granitemoe",
    "ernie4_5_moe",
    "gpt_oss",
    "phimoe",
    "gemma4_text",
)
"""Architectures whose decoder `edge_moe.converters.onnx` can write."""
GGUF_MIXES = ("q2_k/q2_k/q4_k", "q3_k/q3_k/q5_k", "q4_k/q4_k/q6_k")
"""gate/up/down, as in llama.cpp's own mixes: an expert's output hangs most on down_proj. On the
demo model (code and prose, packed by imatrix) they lose 0.89, 0.64 and 0.61 times what layers lose
that are mixed from the forms next in size, at the same bytes. Plans with them (code, seven sizes
from 15 to 35 % of the experts' bytes) diverge 0.97 times as far on held-out text, 0.80 to 1.12.
Sizes are whole multiples of the other forms' unit, which keeps the exact program fast."""
_LLAMA_CPU_ONLY = ("tq1_0", "tq2_0")


@dataclass(frozen=True)
class TargetRules:
    """What a target can express."""

    scope: FormScope
    """Which experts share a form; see `edge_moe.problem.Problem`."""
    classes: _Classes = field(default_factory=dict)
    """Classes of bits offered besides `drop` and the widest form, with their forms."""
    limits: tuple[str, ...] = ()
    """What it cannot express, in sentences."""

    @property
    def packed_forms(self) -> frozenset[str]:
        """All forms of its classes."""
        return frozenset(form for forms in self.classes.values() for form in forms)


TARGET_RULES: dict[Target, TargetRules] = {
    "native": TargetRules(scope="expert", classes=_GGML_CLASSES),
    "gguf": TargetRules(
        scope="layer",
        classes=_GGML_CLASSES,
        limits=(
            "GGUF holds one expert count for the whole model: every layer keeps the same number.",
            "GGUF stores the experts of a layer in one tensor per projection: "
            "they share one form per layer.",
        ),
    ),
    "hf": TargetRules(
        scope="model",
        limits=(
            "Hugging Face safetensors holds one expert count for the whole model: "
            "every layer keeps the same number.",
            "Hugging Face safetensors is written in the checkpoint's own dtype: "
            "experts are kept whole or dropped, never quantised.",
        ),
    ),
    "onnx": TargetRules(
        scope="expert",
        classes=_QMOE_CLASSES,
        limits=(
            "onnxruntime computes each width of a layer in a node of its own, with up to top_k "
            "experts each: a layer that mixes widths decodes more slowly.",
            "onnxruntime has no 3, 5 or 6-bit experts in a float32 graph; experts of more than 8 "
            "bits, and all dense weights, are float32.",
        ),
    ),
}


@dataclass(frozen=True)
class Candidates:
    """The forms on offer, and what is missing."""

    forms: tuple[str, ...]
    """`drop` first, then ascending in bytes; the last is 16-bit (hf: as stored; onnx: float32).
    A GGUF model has no 16-bit one: its layers may stay as they are stored, see `edge_moe.offer`."""
    limits: tuple[str, ...]
    """What the target or the shapes rule out, in sentences."""


def candidate_forms(spec: ModelSpec, target: Target, device: Device = "cpu") -> tuple[str, ...]:
    """`drop`, then one form per class of bits that fits, then the widest.

    Raises:
        TargetError: the target cannot hold this architecture at all.
    """
    return find_candidates(spec, target, device).forms


def stored_expert_bytes(spec: ModelSpec, form: str, target: Target) -> int:
    """One whole expert in `form`, as `target` stores it."""
    return expert_bytes(form, *stored_shape(spec, target))


def stored_shape(spec: ModelSpec, target: Target) -> tuple[int, int, bool]:
    """`ModelSpec.expert_shape` as `target` stores it.

    onnxruntime computes experts without a gate as gated ones: up_proj is there twice.
    """
    hidden_size, expert_width, has_gate = spec.expert_shape
    return hidden_size, expert_width, has_gate or target == "onnx"


def full_expert_bytes(spec: ModelSpec, target: Target) -> int:
    """All experts in the target's largest form."""
    largest = stored_expert_bytes(spec, candidate_forms(spec, target)[-1], target)
    return spec.num_moe_layers * spec.num_experts * largest


def least_expert_bytes(spec: ModelSpec, target: Target) -> int:
    """No plan takes fewer bytes: top_k experts per layer in the target's smallest form."""
    smallest = candidate_forms(spec, target)[1]
    one_bytes = stored_expert_bytes(spec, smallest, target)
    return spec.num_moe_layers * spec.top_k * one_bytes


def find_candidates(
    spec: ModelSpec, target: Target, device: Device = "cpu", measured: Collection[str] = ()
) -> Candidates:
    """The forms on offer for `target`, with a sentence for everything that is not.

    One per class of bits, or those of it that were `measured`.

    Raises:
        TargetError: the target cannot hold this architecture at all.
    """
    check_target(spec, target)
    rules = TARGET_RULES[target]
    forms, limits = [DROP], list(rules.limits)
    classes = rules.classes
    if target == "onnx" and device == "cuda":
        classes = {}
        limits.append(
            "onnxruntime computes integer experts in a float32 graph on the CPU only: on cuda they "
            "are not offered."
        )
    if target == "onnx" and not spec.has_gate:
        limits.append(
            "onnxruntime's MoE squares relu only as a gated expert whose gate is up_proj once "
            "more: experts take half as much again."
        )
    if target == "onnx" and has_branches(spec):
        limits.append(
            "onnxruntime's MoE computes no gated GELU on a CPU: every expert is a branch of the "
            f"graph, which takes {BRANCH_BYTES // 1000} kB, and longer to load."
        )
    if target == "gguf" and not spec.is_gguf:
        limits += spec.family.gguf_limits
    for name, choices in classes.items():
        found, sentences = _pick(spec, name, choices, measured)
        limits += sentences
        if target == "gguf" and any(form in _LLAMA_CPU_ONLY for form in found):
            limits.append(_llama_sentence(device))
            found = found if device == "cpu" else []
        for form in found:
            problem = row_problem(spec, form) if target == "onnx" else None
            if problem is None:
                forms.append(form)
            else:
                limits.append(f"{problem[0].upper()}{problem[1:]}: not offered.")
    if not spec.is_gguf:  # whose layers may be kept as they are stored, and never grow
        forms.append(_widest(spec, target))
    if target == "gguf":
        forms += [mix for mix in GGUF_MIXES if set(split_form(mix)) <= set(forms)]
    forms.sort(key=lambda form: expert_bytes(form, *spec.expert_shape))
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
    if target == "onnx":
        _check_onnx(spec)
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


def _check_onnx(spec: ModelSpec) -> None:
    if spec.model_type not in ONNX_FAMILIES:
        raise TargetError(
            f"target onnx cannot hold architecture {spec.model_type!r} yet: use --target native"
        )
    known = ("silu", *GATED_GELUS) if spec.has_gate else ("relu2",)
    if spec.hidden_act not in known:
        raise TargetError(
            f"target onnx computes such experts with {' or '.join(known)}, this checkpoint has "
            f"{spec.hidden_act}: use --target native"
        )


def _pick(
    spec: ModelSpec, class_name: str, names: tuple[str, ...], measured: Collection[str]
) -> tuple[list[str], list[str]]:
    """(the class's forms that fit and were measured, or the first that fits; a sentence if the
    preferred one does not fit)."""
    preferred = names[0]
    widths = spec.expert_shape
    fitting = [name for name in names if form_fits(name, *widths)]
    chosen = [name for name in fitting if name in measured] or fitting[:1]
    if preferred in fitting:
        return chosen, []
    instead = f"{class_name} is stored as {', '.join(chosen)}" if chosen else "not offered"
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
    if target == "onnx":
        return EXACT
    if target == "hf" or source_form == "bf16":
        return source_form
    return "f16"
