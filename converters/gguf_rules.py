"""What one GGUF file holds of a plan: one count of experts for all layers, one form for a layer."""

from __future__ import annotations

from edge_moe.converters.slicing import check_groups
from edge_moe.errors import TargetError
from edge_moe.plan import Plan
from edge_moe.spec import ModelSpec


def forms_by_layer(plan: Plan, spec: ModelSpec) -> dict[int, str]:
    """The form of every MoE layer's experts, by layer id.

    Raises:
        TargetError: names the first layer that breaks a rule.
    """
    forms: dict[int, str] = {}
    first_id, *_ = plan.moe_layer_ids
    first_count = len(plan.kept(plan.forms[0]))
    for layer_id, row in zip(plan.moe_layer_ids, plan.forms, strict=True):
        kept = plan.kept(row)
        if len(kept) != first_count:
            raise TargetError(
                f"target gguf: layer {layer_id} keeps {len(kept)} experts and layer {first_id} "
                f"keeps {first_count}, but GGUF holds one count for all: plan again with "
                "--target gguf"
            )
        check_groups(layer_id, kept, spec, "gguf")
        mixed = sorted({row[expert_id] for expert_id in kept})
        if len(mixed) > 1:
            raise TargetError(
                f"target gguf: layer {layer_id} mixes the forms {', '.join(mixed)}, but GGUF "
                "stores a layer's experts in one form: plan again with --target gguf"
            )
        forms[layer_id] = mixed[0]
    return forms
