"""A plan's memory bill for another target than the one it was made for."""

from __future__ import annotations

from edge_moe.budget import PROCESS_TARGETS, Setting
from edge_moe.candidates import check_target
from edge_moe.errors import BudgetError
from edge_moe.overhead import runtime_overhead, tokenizer_bytes
from edge_moe.plan import Plan, Source, Target
from edge_moe.source_model import SourceModel
from edge_moe.units import format_bytes, round_up_bytes


def rebill(plan: Plan, model: SourceModel, target: Target) -> Plan:
    """`plan` with the bill of `target`: the same forms, context and budget, that target's memory.

    Targets differ in what they hold beside the experts: the native runtime computes in float32 on
    a CPU, Hugging Face weights keep the checkpoint's dtype, llama.cpp has its own buffers.

    Raises:
        TargetError: `target` cannot hold this architecture.
        BudgetError: the same experts do not fit `plan.budget_bytes` there.
    """
    if target == plan.bill_target:
        return plan
    check_target(model.spec, target)
    process = _process(plan, model, target)
    setting = Setting(model, target, plan.device, plan.context_tokens, process)
    terms = setting.bill(plan.forms)
    total_bytes = sum(term.num_bytes for term in terms)
    if total_bytes > plan.budget_bytes:
        raise BudgetError(
            f"the plan was made for target {plan.target}; as {target} its experts do not fit the "
            f"budget of {format_bytes(plan.budget_bytes)}, they need {round_up_bytes(total_bytes)}:"
            f" plan again with --target {target}",
            total_bytes,
        )
    return plan.model_copy(update={"billed_target": target, "terms": terms})


def _process(plan: Plan, model: SourceModel, target: Target) -> tuple[int, Source]:
    """(bytes, source) of the process that runs `target`, its tokenizer included."""
    if target not in PROCESS_TARGETS:
        return tokenizer_bytes(model.location), "assumed"
    if plan.bill_target in PROCESS_TARGETS:
        term = plan.term("runtime")
        return term.num_bytes, term.source
    num_bytes, source = runtime_overhead(model.spec.model_type, plan.device)
    return num_bytes + tokenizer_bytes(model.location), source
