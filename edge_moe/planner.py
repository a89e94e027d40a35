"""`make_plan`: checkpoint, statistics and budget in; the plan with its bill and rivals out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edge_moe import __version__
from edge_moe.additive import AdditiveStats
from edge_moe.budget import (
    Setting,
    describe_terms,
    minimum_budget_bytes,
    non_expert_bytes,
    resident_expert_bytes,
)
from edge_moe.candidates import SOURCE_FORMS, TARGET_RULES
from edge_moe.errors import BudgetError, StatsError, TargetError
from edge_moe.formats import DROP, least_bits
from edge_moe.gradient_stats import FormCost, GradientStats
from edge_moe.loss_table import DEFAULT_LOSS, GRADIENT_LOSS, LossKind, loss_table
from edge_moe.offer import Offer, find_offer
from edge_moe.optimise import solve
from edge_moe.overhead import tokenizer_bytes
from edge_moe.plan import Device, MemoryTerm, Plan, SearchRecord, Source, Target
from edge_moe.plan_remarks import (
    context_warnings,
    evidence_warnings,
    search_warnings,
    solver_warnings,
    super_expert_limits,
)
from edge_moe.problem import BoolArray, FloatArray, Problem, Solution, smallest_bytes
from edge_moe.published import Program, published_programs, with_room_for_protected
from edge_moe.rivals import find_frontier, find_rivals, name_forms
from edge_moe.search import Evidence, search
from edge_moe.shadow import check_shadow, needs_shadow, with_shadow
from edge_moe.source_model import SourceModel
from edge_moe.spec import ModelSpec
from edge_moe.stats import ExpertStats
from edge_moe.super_experts import MINIMUM_BITS, find_super_experts
from edge_moe.trials import Measure, Measuring, OnShare
from edge_moe.units import format_bytes, round_up_bytes

DEFAULT_CONTEXT_TOKENS = 4096
MeasureForms = Callable[[Mapping[str, list[list[str]]], OnShare], Mapping[str, FloatArray]]
"""Forms [L][E] by name -> KL divergence of every token [N]; see `edge_moe.trials.Measure`."""


def make_plan(
    source: SourceModel,
    stats: ExpertStats,
    budget_bytes: int,
    *,
    model: str,
    context_tokens: int | None = None,
    target: Target = "native",
    device: Device = "cpu",
    runtime: tuple[int, Source],
    gradients: GradientStats | None = None,
    loss_kind: LossKind | None = None,
    measure: MeasureForms | None = None,
    search_seconds: float = 0.0,
    measuring: Measuring | None = None,
    on_share: OnShare = lambda _: None,
    shadow: str | None = None,
    drops_none: bool = False,
) -> Plan:
    """The form of every expert that loses least within `budget_bytes` of device memory.

    `runtime` is the process's own overhead in bytes and where that number comes from. The context
    is capped to what the model was made for; it defaults to `DEFAULT_CONTEXT_TOKENS`. `loss_kind`
    defaults to `GRADIENT_LOSS` where there are `gradients`, and to `DEFAULT_LOSS` otherwise. With
    `measure`, plans proposed in many ways are measured for up to `search_seconds`, as `measuring`
    says, and the best of them is taken; `on_share` is told the share of the time that has passed.
    Where measuring fails, the best so far is taken, and the plan says why. `shadow` is the form of
    the shadows that a native package will hold; with `drops_none` an expert that would be dropped
    takes a form no larger than that instead, and is its own shadow.

    Raises:
        StatsError: the statistics belong to another model or lack a needed loss, or the gradients
            were measured in another run.
        TargetError: the target cannot hold this architecture, or has no place for shadows.
        InputError, FormError: no form of a shadow, or one that does not fit the model's rows.
        BudgetError: nothing fits; carries the smallest budget that works.
    """
    _check_stats(source, stats)
    if gradients is not None:
        gradients.info.require_same_run(stats.info)
    offer = find_offer(source, stats.info.forms, target, device)
    if shadow is not None:
        _check_shadow(shadow, source.spec, target, offer, drops_none=drops_none)
    setting = _setting(source, target, device, context_tokens, runtime)
    fixed_terms = setting.bill([])
    evidence = gather_evidence(
        *(source.spec, stats, offer.forms, target, budget_bytes - non_expert_bytes(fixed_terms)),
        gradients=gradients,
        kind=loss_kind,
        offer=offer,
        drops_none=drops_none,
    )
    _check_budget(evidence.problem, fixed_terms, budget_bytes, target)
    solution, record = solve(evidence.problem), None
    if measure is not None:
        named = by_name(measure, offer.forms)
        solution, record = search(
            *(evidence, solution, named, search_seconds, on_share), measuring=measuring
        )
    asked = _Asked(model, budget_bytes, context_tokens, is_measured=measure is not None)
    plan = _written(asked, setting, offer, evidence, gradients, solution, record)
    return plan if shadow is None else with_shadow(plan, shadow, source.spec)


def _check_shadow(
    shadow: str, spec: ModelSpec, target: Target, offer: Offer, *, drops_none: bool
) -> None:
    """Refuse shadows that have no place, and to keep experts for which no form is small enough.

    Raises:
        TargetError, InputError, FormError, StatsError: each says what to do.
    """
    if target != "native" or spec.is_gguf:
        raise TargetError(
            f"target {target} has no place for shadows, which only a native package of a Hugging "
            "Face checkpoint holds: leave out --shadow, or use --target native"
        )
    check_shadow(shadow, spec)
    smallest = offer.forms[1]
    if drops_none and needs_shadow(smallest, shadow, spec):
        raise StatsError(
            f"the smallest form that was measured is {smallest}, larger than a shadow in {shadow}: "
            "calibrate again with the default --forms, or leave out --keep-pruned-as-shadows"
        )


@dataclass(frozen=True)
class _Asked:
    """What a plan repeats of the question."""

    model: str
    budget_bytes: int
    context_tokens: int | None
    is_measured: bool


def _setting(
    source: SourceModel,
    target: Target,
    device: Device,
    context_tokens: int | None,
    runtime: tuple[int, Source],
) -> Setting:
    longest = source.spec.max_position_embeddings
    context = min(context_tokens or DEFAULT_CONTEXT_TOKENS, longest)
    process = runtime[0] + tokenizer_bytes(source.location), runtime[1]
    return Setting(source, target, device, context, process)


def _written(
    asked: _Asked,
    setting: Setting,
    offer: Offer,
    evidence: Evidence,
    gradients: GradientStats | None,
    solution: Solution,
    record: SearchRecord | None,
) -> Plan:
    """The plan of `solution`, with everything that explains it."""
    spec, stats, problem = setting.model.spec, evidence.stats, evidence.problem
    forms = name_forms(solution.choice, offer.forms)
    rivals, missing_rivals = find_rivals(problem, offer.forms, solution.expert_bytes)
    is_search_expected = spec.is_gguf or asked.is_measured
    below = np.array([0 < least_bits(form) < MINIMUM_BITS for form in offer.forms])
    limited = evidence.supers & ~(_lossless_forms(problem.loss) & below).any(axis=-1)
    return Plan(
        edge_moe_version=__version__,
        model=asked.model,
        model_type=spec.model_type,
        model_fingerprint=setting.model.fingerprint,
        stats_fingerprint=stats_fingerprint(stats),
        gradient_fingerprint="" if gradients is None else stats_fingerprint(gradients),
        tasks=list(stats.info.tasks),
        target=setting.target,
        device=setting.device,
        budget_bytes=asked.budget_bytes,
        context_tokens=setting.context_tokens,
        moe_layer_ids=list(spec.moe_layer_ids),
        top_k=spec.top_k,
        forms=forms,
        tiers=[[_tier(form) for form in row] for row in forms],
        terms=setting.bill(forms),
        loss=solution.loss,
        loss_unit=evidence.kind.unit,
        frontier=find_frontier(problem, non_expert_bytes(setting.bill([])), solution),
        rivals=rivals,
        saliency=_share_of_layer(problem.loss[..., 0]),
        routed_share=_share_of_layer(stats.routed_tokens.astype(np.float64)),
        super_experts=_expert_keys(spec, evidence.supers),
        form_bytes=dict(zip(offer.forms, problem.form_bytes.tolist(), strict=True)),
        stored_forms=list(offer.stored) if spec.is_gguf else [],
        limits=[*offer.limits, *super_expert_limits(spec, limited, setting.target)],
        warnings=[
            *solver_warnings(solution),
            *context_warnings(asked.context_tokens, setting.context_tokens),
            *evidence_warnings(stats),
            *search_warnings(record, is_expected=is_search_expected),
            *missing_rivals,
        ],
        search=record,
        calibration=stats.info.options,
        data_fingerprint=stats.info.data_fingerprint,
    )


def gather_evidence(
    spec: ModelSpec,
    stats: ExpertStats,
    forms: Sequence[str],
    target: Target,
    expert_budget_bytes: int,
    *,
    gradients: GradientStats | None = None,
    kind: LossKind | None = None,
    offer: Offer | None = None,
    drops_none: bool = False,
) -> Evidence:
    """What plans of `forms` within `expert_budget_bytes` are made from.

    `kind` defaults to `GRADIENT_LOSS` where there are `gradients`, and to `DEFAULT_LOSS` otherwise.
    `offer` says what each layer is stored in and may take, where layers differ.
    """
    stored = SOURCE_FORMS[spec.dtype] if offer is None else offer.stored
    kind = kind or (DEFAULT_LOSS if gradients is None else GRADIENT_LOSS)
    supers = find_super_experts(stats.max_output)

    def table(kind: LossKind) -> FloatArray:
        return loss_table(stats, forms, stored, kind, gradients)

    problem = build_problem(
        *(spec, forms, table(kind), supers, target, expert_budget_bytes),
        offer=offer,
        drops_none=drops_none,
    )
    published: dict[str, Program] = {}
    if problem.scope == "expert":
        smaller = with_room_for_protected(problem)
        published = published_programs(smaller, forms, stats, gemq_cost(spec, forms, gradients))
    return Evidence(problem, stats, supers, table, kind, gradients is not None, published)


def gemq_cost(
    spec: ModelSpec, forms: Sequence[str], gradients: GradientStats | None
) -> FloatArray | None:
    """[L, E, F] as GEMQ weighs a change: every element by its own mean squared gradient."""
    if gradients is None:
        return None
    return gradients.cost_table(forms, SOURCE_FORMS[spec.dtype], FormCost.DIAGONAL)


def build_problem(
    spec: ModelSpec,
    forms: Sequence[str],
    losses: FloatArray,
    supers: BoolArray,
    target: Target,
    expert_budget_bytes: int,
    *,
    offer: Offer | None = None,
    drops_none: bool = False,
) -> Problem:
    """The optimiser's input: [L, E, F] `losses`, bytes of `forms`, rules of `target`.

    `supers` [L, E] are neither dropped nor stored below 4 bits, or stay as they are stored; smaller
    forms that were measured to lose nothing will do.
    """
    protected = np.array([least_bits(form) >= MINIMUM_BITS for form in forms])  # [F]
    if offer is not None:
        as_stored = [[form == own for form in forms] for own in offer.stored]
        protected = protected | np.array(as_stored)[:, None]  # [L, 1, F]
    allowed = ~supers[..., None] | protected | _lossless_forms(losses)
    if offer is not None:
        allowed &= offer.allowed[:, None]
    if drops_none:
        allowed[..., 0] = False
    return Problem(
        loss=losses,
        form_bytes=np.array(
            [resident_expert_bytes(spec, form, target) for form in forms], np.int64
        ),
        allowed=allowed,
        budget_bytes=expert_budget_bytes,
        top_k=max(spec.top_k, spec.fewest_experts),
        num_groups=spec.router.num_groups,
        top_groups=spec.router.top_groups,
        scope=TARGET_RULES[target].scope,
    )


def _lossless_forms(losses: FloatArray) -> BoolArray:
    """[L, E, F] forms that lose nothing of an expert without which something would be lost."""
    return np.asarray((losses == 0) & (losses[..., :1] > 0))


def stats_fingerprint(stats: AdditiveStats[Any]) -> str:
    """sha256 over everything that the statistics hold."""
    digest = hashlib.sha256(stats.info.model_dump_json(exclude={"options"}).encode())
    for name, array in sorted(stats.to_arrays().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _check_stats(source: SourceModel, stats: ExpertStats) -> None:
    found, wanted = stats.info.model_fingerprint, source.fingerprint
    if found != wanted:
        raise StatsError(
            f"the statistics were measured on another model (fingerprint {found[:12]}, "
            f"{source.location} has {wanted[:12]}): calibrate this one"
        )
    spec, info = source.spec, stats.info
    if (info.moe_layer_ids, info.num_experts) != (spec.moe_layer_ids, spec.num_experts):
        raise StatsError(
            f"the statistics cover {len(info.moe_layer_ids)} layers of {info.num_experts} experts, "
            f"{source.location} has {spec.num_moe_layers} of {spec.num_experts}: calibrate again"
        )


def _check_budget(
    problem: Problem, fixed_terms: Sequence[MemoryTerm], budget_bytes: int, target: Target
) -> None:
    least_expert_bytes = smallest_bytes(problem)
    if least_expert_bytes is None:
        raise StatsError("no form that was measured can hold the super experts: calibrate again")
    minimum_bytes = minimum_budget_bytes(fixed_terms, least_expert_bytes)
    if budget_bytes >= minimum_bytes:
        return
    rest = [term for term in fixed_terms if term.name != "experts"]
    message = (
        f"budget {format_bytes(budget_bytes)} is too small: the smallest that works is "
        f"{round_up_bytes(minimum_bytes)} ({describe_terms(rest)} + experts at least "
        f"{format_bytes(least_expert_bytes)}); raise --budget or lower --ctx"
    )
    if target == "native":
        message += ", or plan for more and let `edge-moe run --budget` page experts from disk"
    raise BudgetError(message, minimum_bytes)


def by_name(measure: MeasureForms, forms: Sequence[str]) -> Measure:
    """`measure` for tables of form indices."""
    return lambda choices, on_run: measure(
        {name: name_forms(choice, forms) for name, choice in choices.items()}, on_run
    )


def _tier(form: str) -> Literal["device", "ram", "disk", "none"]:
    return "none" if form == DROP else "device"


def _share_of_layer(table: FloatArray) -> list[list[float]]:
    """[L][E] values as a share of their layer's sum; zeros where that is zero."""
    sums = table.sum(axis=1, keepdims=True)
    shares = np.divide(table, sums, out=np.zeros_like(table), where=sums > 0)
    return [[float(value) for value in row] for row in shares]


def _expert_keys(spec: ModelSpec, supers: BoolArray) -> list[tuple[int, int]]:
    return [(spec.moe_layer_ids[layer], int(expert)) for layer, expert in np.argwhere(supers)]
