"""Propose plans in many ways, measure them, take what is surely better: no way wins everywhere.

The optimiser's loss is a sum over experts; what a model really loses is not. So the weights of that
sum (what dropping costs, how much evidence rare experts need, how layers compare) and the field's
saliency criteria each propose a plan within the same budget, and the KL divergence on held-out text
decides. No torch here: measuring is handed in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from edge_moe.errors import BudgetError, InputError, SolverError, StatsError
from edge_moe.expert_moves import tune_experts
from edge_moe.loss_table import DEFAULT_LOSS, DropLoss, LayerScale, LossKind
from edge_moe.optimise import solve
from edge_moe.plan import SearchRecord, SearchTrial
from edge_moe.problem import BoolArray, FloatArray, IntArray, Problem, Solution, smallest_bytes
from edge_moe.published import Program
from edge_moe.saliency import CRITERIA, keep_largest, saliency
from edge_moe.stats import ExpertStats
from edge_moe.trials import (
    Measure,
    Measuring,
    MeasuringFailed,
    OnShare,
    TimeUp,
    Trial,
    Trials,
    surest,
)

Tables = Callable[[LossKind], FloatArray]
"""A kind of loss -> its table [L, E, F]."""

PLAN_NAME = "default loss"
MIXED_BITS = "mixed bits, none dropped"
ONE_FORM = "one form for all"
DROP_FACTORS = (1.0, 2.0, 4.0, 8.0)
PRIOR_TOKENS = (0.0, 16.0, 64.0)
LAYER_FACTORS = (0.5, 2.0)
ROUNDS = ("kinds of loss", "experts moved", "layers weighed", "published programs", "criteria")
"""Of the search, in order of how often they helped: the time may run out."""
MAX_LAYER_GROUPS = 8
SOLVE_SECONDS = 10.0
"""Time limit of the integer program for one proposal."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What proposals are made from."""

    problem: Problem
    """With the loss `kind` and the plan's budget."""
    stats: ExpertStats
    supers: BoolArray
    """[L, E] protected experts."""
    tables: Tables
    kind: LossKind = DEFAULT_LOSS
    has_gradients: bool = False
    """Whether `tables` knows the kinds that need them."""
    published: Mapping[str, Program] = field(default_factory=dict)
    """Other programs that propose a plan each; protected experts are raised afterwards."""

    @property
    def kinds(self) -> dict[str, LossKind]:
        """The kinds of loss that propose plans, likeliest first: the time may run out."""
        scales = [scale for scale in LayerScale if scale.needs_gradients and self.has_gradients]
        kinds = [LossKind(layers=scale, drop_factor=x) for scale in scales for x in DROP_FACTORS]
        kinds += [
            LossKind(drop_factor=factor, prior_tokens=prior)
            for prior in PRIOR_TOKENS
            for factor in DROP_FACTORS
        ]
        kinds += [LossKind(DropLoss.MEAN), LossKind(DropLoss.ZERO)]
        return {PLAN_NAME: self.kind} | {kind.name: kind for kind in kinds}


def search(
    evidence: Evidence,
    first: Solution,
    measure: Measure,
    seconds: float,
    on_share: OnShare = lambda _: None,
    on_round: Callable[[str, IntArray], None] = lambda name, choice: None,
    measuring: Measuring | None = None,
) -> tuple[Solution, SearchRecord]:
    """(the solution that was taken, every trial). `first` is the plain program's.

    Rounds: the kinds of loss; single experts moved from the best of them on, as long as that helps;
    layers made dearer or cheaper; the published programs; the criteria, at about the number of
    experts that the best plan keeps. Stops `seconds` after the first plan was measured: with that
    plan experts are packed that later ones share, which may take `seconds`, too. `on_share` is told
    the share of them that has passed, `on_round` the choice [L, E] that every round ends with.
    Nothing else is measured where the first plan changes no token's distribution.
    It stops, too, where `measure` fails, and keeps what was measured before; the record says why.
    `measuring` says what `measure` can do.
    Which plan takes the first one's place: see `edge_moe.trials`.

    Raises:
        InputError: `seconds` are none.
    """
    if seconds <= 0:
        raise InputError(f"{seconds:g} seconds of search are none: use --no-search instead")
    start = time.monotonic()
    trials, failure = Trials(evidence.problem, measure, seconds, on_share, measuring), ""
    try:
        trials.add({PLAN_NAME: first.choice})
        trials.restart_clock()
        is_perfect = trials.best.kld == 0  # the model itself: nothing can be better
        for name, run in ({} if is_perfect else _rounds(evidence, trials)).items():
            try:
                run()
            finally:
                on_round(name, trials.best.choice)
    except TimeUp:
        trials.is_cut_short = True
    except MeasuringFailed as error:
        trials.is_cut_short, failure = True, str(error)
    best = trials.best if trials.results else Trial(PLAN_NAME, first.choice, np.array([np.nan]))
    record = SearchRecord(
        chosen=best.name,
        is_complete=not trials.is_cut_short,
        seconds=time.monotonic() - start,
        trials=[SearchTrial(name=each.name, kld=each.kld) for each in trials.results],
        limit_seconds=seconds,
        failure=failure,
    )
    return Solution.of(evidence.problem, best.choice), record


def _rounds(evidence: Evidence, trials: Trials) -> dict[str, Callable[[], None]]:
    runs = (
        lambda: trials.add_all(_by_loss(evidence)),
        lambda: tune_experts(evidence.problem, trials),
        lambda: _tune_layers(evidence, trials),
        lambda: trials.add_all(_by_published(evidence)),
        lambda: trials.add_all(_by_criterion(evidence, trials.best.choice)),
    )
    return dict(zip(ROUNDS, runs, strict=True))


def _by_loss(evidence: Evidence) -> Iterator[tuple[str, IntArray]]:
    """One proposal per kind of loss, mixed bits without dropping, and one form for all."""
    problem = evidence.problem
    uniform = _one_form(problem)
    if uniform is not None:
        yield ONE_FORM, uniform
    kept_forms = list(range(1, len(problem.form_bytes)))
    mixed = _solved(problem.only_forms(kept_forms, problem.budget_bytes))
    if mixed is not None:
        yield MIXED_BITS, mixed
    for name, kind in evidence.kinds.items():
        if name == PLAN_NAME:
            continue  # measured already
        choice = _solved(replace(problem, loss=evidence.tables(kind)))
        if choice is not None:
            yield name, choice


def _by_published(evidence: Evidence) -> Iterator[tuple[str, IntArray]]:
    """One proposal per published program that fits, its protected experts raised."""
    for name, program in evidence.published.items():
        with suppress(BudgetError, StatsError, SolverError):
            choice = program(SOLVE_SECONDS).choice
            yield name, np.maximum(choice, evidence.problem.lowest_form)


def _one_form(problem: Problem) -> IntArray | None:
    """[L, E] every expert in the largest form that fits, where all may take it."""
    form = problem.largest_single_form(problem.budget_bytes)
    if form == 0 or not problem.allowed[..., form].all():
        return None
    return np.full(problem.loss.shape[:2], form)


def _by_criterion(evidence: Evidence, best: IntArray) -> Iterator[tuple[str, IntArray]]:
    """The experts that a criterion keeps, their bits by the program; near the best plan's count."""
    problem, num_groups = evidence.problem, evidence.problem.num_groups
    mean_kept = float((best > 0).sum(axis=1).mean()) / num_groups
    counts = {round(mean_kept * share) for share in (0.75, 1.0, 1.25)}
    lowest = int(problem.group_bounds[0].max())
    for per_group in sorted({min(max(count, lowest), problem.group_size) for count in counts}):
        if per_group == problem.group_size:
            continue
        count = per_group * num_groups
        for name in CRITERIA:
            scores = saliency(evidence.stats, name)
            kept = keep_largest(scores, count, evidence.supers, num_groups)
            choice = _solved(_with_kept(problem, kept))
            if choice is not None:
                yield f"{name}, {count} per layer", choice


def _tune_layers(evidence: Evidence, trials: Trials) -> None:
    """Make one group of layers dearer or cheaper at a time, from the best kind of loss on."""
    problem = evidence.problem
    num_layers = problem.num_layers
    groups = np.array_split(np.arange(num_layers), min(num_layers, MAX_LAYER_GROUPS))
    base = _best_kind(evidence.kinds, trials)
    table, weights = evidence.tables(base), np.ones(num_layers)
    while True:
        proposals, changed = {}, {}
        for layers in groups:
            for factor in LAYER_FACTORS:
                tried = weights.copy()
                tried[layers] *= factor
                name = f"{base.name}, layer weights {_brief(tried[[g[0] for g in groups]])}"
                choice = _solved(replace(problem, loss=table * tried[:, None, None]))
                if choice is not None:
                    proposals[name], changed[name] = choice, tried
        if not trials.add(proposals) or trials.best.name not in changed:
            return
        weights = changed[trials.best.name]


def _best_kind(kinds: Mapping[str, LossKind], trials: Trials) -> LossKind:
    """The kind of loss whose plan is the surest to be better than the first one, or that one's."""
    measured = [trial for trial in trials.results if trial.name in kinds]
    return kinds[surest(measured[0], measured).name]


def _with_kept(problem: Problem, kept: BoolArray) -> Problem:
    """The same problem with the kept experts fixed."""
    allowed = problem.allowed & kept[..., None]
    allowed[..., 0] = ~kept
    return replace(problem, allowed=allowed)


def _solved(problem: Problem) -> IntArray | None:
    """[L, E] the optimum, or None where nothing fits."""
    least_bytes = smallest_bytes(problem)
    if least_bytes is None or least_bytes > problem.budget_bytes:
        return None
    try:
        return solve(problem, SOLVE_SECONDS).choice
    except BudgetError:
        return None


def _brief(weights: Sequence[float] | FloatArray) -> str:
    return " ".join(f"{weight:g}" for weight in weights)
