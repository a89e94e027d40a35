"""What a checkpoint or package is, from its headers alone: shapes, bytes by component, forms.

No weights are read, so a checkpoint of any size takes the time of parsing its headers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from edge_moe.candidates import find_candidates
from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import TargetError
from edge_moe.formats import DROP, FORM_NAMES, expert_bytes, form_fits, get_form
from edge_moe.hub import is_hub_id, local_path, remote_checkpoint
from edge_moe.package import ADAPTER_NAME, RESIDENT_NAME, Package, is_package
from edge_moe.plan import Target
from edge_moe.safetensors_header import read_header
from edge_moe.spec import ModelSpec
from edge_moe.tensor_info import TensorInfo

KV_TOKENS = 1024
"""KV cache bytes are stated for this many tokens."""
COMPONENTS = (
    "embeddings",
    "attention",
    "norms",
    "routers",
    "shared experts",
    "dense MLPs",
    "routed experts",
    "other",
    "not loaded",
)
"""In the order of printing. `not loaded`: layers past the last one, for multi-token prediction."""
_CACHE_ITEMSIZE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Component(_Model):
    """The tensors of one kind, summed."""

    name: str
    num_tensors: int
    num_bytes: int


class FormBytes(_Model):
    """One expert, stored in one form that its row widths allow."""

    form: str
    label: str
    bits_per_weight: float
    expert_bytes: int
    token_cycle_bytes: int
    """What one token reads: top_k experts in every MoE layer."""


class TargetFit(_Model):
    """What one target can express for this model."""

    target: Target
    forms: list[str]
    """Forms a plan for it may choose from; none where it cannot hold the architecture."""
    limits: list[str]
    """What it cannot express, in sentences."""


class ModelInspection(_Model):
    """`edge-moe inspect` of a checkpoint (local or on a hub) or of a native package."""

    model: str
    kind: Literal["checkpoint", "hub", "package"]
    architecture: str
    model_type: str
    dtype: str
    num_layers: int
    num_moe_layers: int
    num_experts: int
    """Per MoE layer, in the source checkpoint."""
    kept_experts: list[int] | None = None
    """Per MoE layer, of a package."""
    kept_forms: dict[str, int] | None = None
    """Experts of a package by form, over all layers."""
    top_k: int
    num_shared_experts: int
    router: str
    hidden_size: int
    expert_width: int
    vocab_size: int
    max_context_tokens: int
    total_parameters: int | None
    """None for a package: its packed experts have bytes, not parameters."""
    active_parameters: int | None
    """Parameters that one token uses, embeddings included."""
    total_bytes: int
    components: list[Component]
    forms: list[FormBytes]
    kv_bytes_per_1024_tokens: int
    """In the checkpoint's dtype; the native runtime caches float32 on a CPU."""
    targets: list[TargetFit]
    """Empty for a package: what is packed already cannot be exported."""


def inspect_model(model: str, revision: str | None = None) -> ModelInspection:
    """Inspect a checkpoint folder, a native package or a hub id; see `inspect_gguf` for .gguf.

    Raises:
        InputError, SpecError, CheckpointError, PackageError: it is missing, damaged or unknown.
    """
    if is_hub_id(model):
        return _inspect_checkpoint(model, remote_checkpoint(model, revision), "hub")
    folder = local_path(model)
    if is_package(folder):
        return _inspect_package(model, Package(folder))
    return _inspect_checkpoint(model, Checkpoint(folder), "checkpoint")


_EXPERT_BIASES = ("e_score_correction_bias", "expert_bias", "proj_bias")


def component_of(name: str) -> str:
    """The component that dense tensor `name` belongs to."""
    modules = name.split(".")[:-1]
    module = modules[-1] if modules else ""
    if module in ("embed_tokens", "embeddings", "lm_head"):
        return "embeddings"
    if "router" in modules or name.endswith(_EXPERT_BIASES):
        return "routers"
    if module.endswith(("norm", "norm_f")):
        return "norms"
    if any(part.endswith("attn") for part in modules):
        return "attention"
    if any(part.startswith("shared_expert") for part in modules):
        return "shared experts"
    if module == "gate":
        return "routers"
    return "dense MLPs" if "mlp" in modules or "feed_forward" in modules else "other"


def sum_components(
    tensors: Iterable[TensorInfo], names: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """component -> (tensors, bytes); `names` gives each tensor's component."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for info in tensors:
        counts[names[info.name]] += 1
        sizes[names[info.name]] += info.stored_bytes
    return {name: (counts[name], sizes[name]) for name in counts}


def _inspect_checkpoint(
    model: str, checkpoint: Checkpoint, kind: Literal["checkpoint", "hub"]
) -> ModelInspection:
    spec = checkpoint.spec
    names = {info.name: component_of(info.name) for info in checkpoint.dense_tensors}
    names |= dict.fromkeys(checkpoint.expert_tensors, "routed experts")
    names |= dict.fromkeys(checkpoint.unused_tensors, "not loaded")
    names |= {info.name: "not loaded" for info in checkpoint.other_tensors}
    return _inspection(
        model,
        kind,
        spec,
        sum_components(checkpoint.tensors.values(), names),
        total_parameters=checkpoint.total_parameters,
        active_parameters=checkpoint.active_parameters,
    )


def _inspect_package(model: str, package: Package) -> ModelInspection:
    tensors, _ = read_header(package.folder / RESIDENT_NAME)
    if package.manifest.adapter is not None:
        tensors |= read_header(package.folder / ADAPTER_NAME)[0]
    names = {name: component_of(name) for name in tensors}
    sums = sum_components(tensors.values(), names)
    records = [record for layer in package.manifest.layers for record in layer.experts]
    sums["routed experts"] = (len(records), sum(record.num_bytes for record in records))
    return _inspection(
        model,
        "package",
        package.spec,
        sums,
        kept_experts=[len(layer.experts) for layer in package.manifest.layers],
        kept_forms=dict(Counter(record.form for record in records)),
    )


def _inspection(
    model: str,
    kind: Literal["checkpoint", "hub", "package"],
    spec: ModelSpec,
    sums: dict[str, tuple[int, int]],
    *,
    total_parameters: int | None = None,
    active_parameters: int | None = None,
    kept_experts: list[int] | None = None,
    kept_forms: dict[str, int] | None = None,
) -> ModelInspection:
    return ModelInspection(
        model=model,
        kind=kind,
        architecture=spec.architecture,
        model_type=spec.model_type,
        dtype=spec.dtype,
        num_layers=spec.num_layers,
        num_moe_layers=spec.num_moe_layers,
        num_experts=spec.num_experts,
        kept_experts=kept_experts,
        kept_forms=kept_forms,
        top_k=spec.top_k,
        num_shared_experts=spec.num_shared_experts,
        router=spec.router.describe(),
        hidden_size=spec.hidden_size,
        expert_width=spec.expert_width,
        vocab_size=spec.vocab_size,
        max_context_tokens=spec.max_position_embeddings,
        total_parameters=total_parameters,
        active_parameters=active_parameters,
        total_bytes=sum(num_bytes for _, num_bytes in sums.values()),
        components=[
            Component(name=name, num_tensors=sums[name][0], num_bytes=sums[name][1])
            for name in COMPONENTS
            if name in sums
        ],
        forms=form_table(spec),
        kv_bytes_per_1024_tokens=KV_TOKENS
        * spec.kv_bytes_per_token(_CACHE_ITEMSIZE_BYTES[spec.dtype]),
        targets=[]
        if kind == "package"
        else [target_fit(spec, target) for target in get_args(Target)],
    )


def form_table(spec: ModelSpec) -> list[FormBytes]:
    """Every form but `drop` that fits the rows of this model's experts, fewest bytes first."""
    rows = []
    for name in FORM_NAMES:
        if name == DROP or not form_fits(name, *spec.expert_shape):
            continue
        one_expert = expert_bytes(name, *spec.expert_shape)
        rows.append(
            FormBytes(
                form=name,
                label=get_form(name).label,
                bits_per_weight=get_form(name).bits_per_weight,
                expert_bytes=one_expert,
                token_cycle_bytes=one_expert * spec.top_k * spec.num_moe_layers,
            )
        )
    return sorted(rows, key=lambda row: row.expert_bytes)


def target_fit(spec: ModelSpec, target: Target) -> TargetFit:
    """Forms and limits of `target` for this model, on a CPU."""
    try:
        found = find_candidates(spec, target)
    except TargetError as error:
        return TargetFit(target=target, forms=[], limits=[str(error)])
    return TargetFit(target=target, forms=list(found.forms), limits=list(found.limits))
