"""A round of the search: what one expert's form is worth inside the plan, measured.

A loss table measures each expert alone, in a model that is otherwise whole. Here the best plan so
far is changed by one expert at a time, one form up or down, and the change of the KL divergence is
the loss. All that is still assumed is that such small changes add up; the program chooses among
them within the budget, and what it proposes is measured before it is believed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from edge_moe.errors import BudgetError
from edge_moe.optimise import solve
from edge_moe.problem import BoolArray, IntArray, Problem
from edge_moe.trials import Change, TimeUp, Trials

CAUTIONS = (0.0, 1.0, 2.0)
"""Every move is taken to cost this many standard errors more than its mean."""
SOLVE_SECONDS = 10.0
_RESERVE = 1.5  # of the time that the proposals will take, as passes differ


@dataclass(frozen=True)
class Move:
    """Experts of one layer that change to one form together."""

    layer: int
    experts: tuple[int, ...]
    form: int

    def applied(self, choice: IntArray) -> IntArray:
        """[L, E] `choice` after the move."""
        changed = choice.copy()
        changed[self.layer, list(self.experts)] = self.form
        return changed


def tune_experts(problem: Problem, trials: Trials) -> None:
    """Move experts from the best trial on, as long as that helps.

    After a round only experts that moved are measured again: what the others' moves change is taken
    to be the same from the new plan on. Where there is no time for a single pass, nothing is done
    but `trials` are told that they are cut short: other proposals may need less.

    Raises:
        TimeUp: there was no time for every move of a round. Those that were measured were used,
            unless a pass took so much longer than the one before that no time was left for that.
    """
    base, known = trials.best.choice, dict[Move, Change]()
    for number in count(1):
        possible = possible_moves(problem, base, trials.measuring.needs_equal_counts)
        moves = sorted(possible, key=lambda move: -_stake(problem, base, move))
        known |= _measured([move for move in moves if move not in known], base, trials)
        changes = {move: known[move] for move in moves if move in known}
        if not changes and moves:
            trials.is_cut_short = True
            return
        helped = trials.add(dict(_proposals(problem, base, changes, number)))
        if len(changes) < len(moves):
            raise TimeUp
        if not helped:
            return
        moved, base = base != trials.best.choice, trials.best.choice
        known = {
            move: change
            for move, change in known.items()
            if not moved[move.layer, list(move.experts)].any()
        }


def possible_moves(
    problem: Problem, choice: IntArray, keeps_counts: bool = False
) -> Iterator[Move]:
    """Single steps from `choice` [L, E] that the rules allow, whatever they take of the budget.

    Under scope `expert` every expert goes to the next form up or down. Where kept experts share a
    form, one expert is dropped or comes back in its layer's form, and, under scope `layer`, all
    kept ones of a layer go up or down. Where routers count groups no expert comes or goes, nor
    where experts share a form and `keeps_counts` asks for it.
    """
    for layer, row in enumerate(choice):
        kept = tuple(int(expert) for expert in np.flatnonzero(row))
        if problem.scope == "layer":
            shared = np.logical_and.reduce(problem.allowed[layer, list(kept)])
            shared[0] = False
            yield from (Move(layer, kept, form) for form in _steps(shared, row[kept[0]]))
        if keeps_counts and problem.scope != "expert":
            continue
        for expert, form in enumerate(row.tolist()):
            allowed = problem.allowed[layer, expert].copy()
            if problem.scope != "expert":
                allowed &= np.isin(np.arange(len(allowed)), (0, form, row[kept[0]]))
            allowed[0] &= form == 0 or _may_go(problem, len(kept))
            allowed[1:] &= form > 0 or problem.num_groups == 1  # groups keep equal numbers
            yield from (Move(layer, (expert,), other) for other in _steps(allowed, form))


def local_problem(
    problem: Problem, choice: IntArray, changes: Mapping[Move, Change], caution: float
) -> Problem:
    """Stay, or make measured moves: each costs its change and `caution` standard errors more."""
    table, allowed = np.zeros_like(problem.loss), np.zeros_like(problem.allowed)
    np.put_along_axis(allowed, choice[..., None], values=True, axis=-1)
    for move, change in changes.items():
        where = move.layer, list(move.experts), move.form
        table[where] = change.upper(caution) / len(move.experts)
        allowed[where] = True
    least = np.where(allowed, table, np.inf).min(axis=-1, keepdims=True)
    return replace(problem, loss=np.where(allowed, table - least, 0.0), allowed=allowed)


def _proposals(
    problem: Problem, base: IntArray, changes: Mapping[Move, Change], number: int
) -> Iterator[tuple[str, IntArray]]:
    if not changes:
        return
    for caution in CAUTIONS:
        try:
            found = solve(local_problem(problem, base, changes, caution), SOLVE_SECONDS)
        except (BudgetError, ValueError):
            continue  # rounding: `base` itself fits
        yield f"experts moved, round {number}, caution {caution:g}", found.choice


def _measured(moves: Sequence[Move], base: IntArray, trials: Trials) -> dict[Move, Change]:
    """Change of the KL divergence by each move, for as many as there is time."""
    found: dict[Move, Change] = {}
    before = trials.best.token_kld
    for part in trials.passes({str(index): move.applied(base) for index, move in enumerate(moves)}):
        needed = len(part) + _RESERVE * len(CAUTIONS)
        if trials.left_seconds < needed * trials.seconds_per_plan:
            break
        for name, kld in trials.probe(part).items():
            found[moves[int(name)]] = Change.between(before, kld)
    return found


def _stake(problem: Problem, base: IntArray, move: Move) -> float:
    """How much the optimiser's own loss changes by the move."""
    before = problem.loss[move.layer, list(move.experts), base[move.layer, list(move.experts)]]
    return float(abs(problem.loss[move.layer, list(move.experts), move.form] - before).sum())


def _steps(allowed: BoolArray, form: int) -> list[int]:
    """The next allowed forms [F] below and above `form`."""
    ids = np.flatnonzero(allowed)
    return [*ids[ids < form][-1:].tolist(), *ids[ids > form][:1].tolist()]


def _may_go(problem: Problem, num_kept: int) -> bool:
    """Whether a layer that keeps `num_kept` experts can lose one."""
    return problem.num_groups == 1 and num_kept > problem.group_minimum
