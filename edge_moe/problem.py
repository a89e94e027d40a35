"""The planning problem in numbers: loss and bytes of every expert in every form, and the rules.

L MoE layers, E experts, F forms. Form 0 is `drop`; the others stand in order of ascending bytes,
where composites of the same types may tie.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

ScalarT = TypeVar("ScalarT", bound=np.generic)
FormScope = Literal["expert", "layer", "model"]


@dataclass(frozen=True, eq=False)
class Problem:
    """Choose one form per expert: least total loss within `budget_bytes`."""

    loss: FloatArray
    """[L, E, F] finite, >= 0."""
    form_bytes: IntArray
    """[F] bytes of one expert, never descending, `form_bytes[0] == 0`, the others above 0."""
    allowed: BoolArray
    """[L, E, F] forms that each expert may take; protected experts may not be dropped."""
    budget_bytes: int
    """Limit on the bytes of all experts together."""
    top_k: int
    num_groups: int = 1
    top_groups: int = 1
    scope: FormScope = "expert"
    """`expert`: every expert has its own form, every layer its own count of kept experts.
    `layer` or `model`: kept experts of one layer, or of all, share one form, and every layer keeps
    the same number of them."""

    def __post_init__(self) -> None:
        steps = np.diff(self.form_bytes)
        if self.form_bytes[0] != 0 or (steps < 0).any() or (steps[:1] <= 0).any():
            raise ValueError(f"form_bytes {self.form_bytes} must start at 0 and ascend")
        if self.loss.shape != self.allowed.shape or self.loss.shape[2] != len(self.form_bytes):
            raise ValueError("loss, allowed and form_bytes do not agree on [L, E, F]")

    @property
    def num_layers(self) -> int:
        return int(self.loss.shape[0])

    @property
    def group_size(self) -> int:
        return int(self.loss.shape[1]) // self.num_groups

    @property
    def group_minimum(self) -> int:
        """Experts that every group of every layer keeps at least.

        A group-limited router ranks groups by the sum of their best two scores, and chooses top_k
        experts inside its best `top_groups` groups.
        """
        enough_for_top_k = -(-self.top_k // self.top_groups)
        pair = 2 if self.num_groups > 1 else 1
        return max(enough_for_top_k, min(pair, self.group_size))

    @cached_property
    def lowest_form(self) -> IntArray:
        """[L, E] the smallest form that each expert may take; 0 where it may be dropped."""
        return np.asarray(self.allowed.argmax(axis=-1))

    @cached_property
    def form_allowed(self) -> BoolArray:
        """[L, F] forms that some expert of a layer may take."""
        return np.asarray(self.allowed.any(axis=1))

    @cached_property
    def whole_form(self) -> IntArray:
        """[L, E] the largest form that each expert may take: as the source stores it."""
        last = len(self.form_bytes) - 1
        return np.asarray(last - self.allowed[..., ::-1].argmax(axis=-1))

    @cached_property
    def must_keep(self) -> BoolArray:
        """[L, E]"""
        return ~self.allowed[..., 0]

    @cached_property
    def can_keep(self) -> BoolArray:
        """[L, E]"""
        return np.asarray(self.allowed[..., 1:].any(axis=-1))

    @cached_property
    def group_bounds(self) -> tuple[IntArray, IntArray]:
        """([L], [L]) fewest and most experts that each group of a layer may keep."""
        least = self.by_group(self.must_keep).sum(axis=-1).max(axis=-1)
        most = self.by_group(self.can_keep).sum(axis=-1).min(axis=-1)
        return np.maximum(least, self.group_minimum), most

    def by_group(self, table: npt.NDArray[ScalarT]) -> npt.NDArray[ScalarT]:
        """[L, E, ...] -> [L, G, E / G, ...]; groups are runs of consecutive experts."""
        return table.reshape(self.num_layers, self.num_groups, self.group_size, *table.shape[2:])

    def even_counts(self, form: int, num_bytes: int) -> IntArray:
        """[L] experts in `form` per router group of each layer, as many as `num_bytes` pay for.

        All layers get the same number; where they may differ, the first ones get what is left over.
        """
        affordable = num_bytes // int(self.form_bytes[form]) // self.num_groups
        per_group, extra = divmod(affordable, self.num_layers)
        counts = np.full(self.num_layers, per_group, np.int64)
        if self.scope == "expert":
            counts[:extra] += 1
        return counts

    def only_forms(self, form_indices: list[int], budget_bytes: int) -> Problem:
        """The same problem where nothing but `form_indices` may be used."""
        mask = np.zeros(len(self.form_bytes), np.bool_)
        mask[form_indices] = True
        return replace(self, allowed=self.allowed & mask, budget_bytes=budget_bytes)

    def whole_or_dropped(self, budget_bytes: int) -> Problem:
        """The same problem where experts stay in their `whole_form` or are dropped."""
        index = np.arange(len(self.form_bytes))
        mask = (index == 0) | (index == self.whole_form[..., None])
        return replace(self, allowed=self.allowed & mask, budget_bytes=budget_bytes)

    def largest_single_form(self, budget_bytes: int) -> int:
        """The largest form in which all experts together fit; 0 (`drop`) where none does."""
        fits = self.form_bytes * self.loss[..., 0].size <= budget_bytes
        return int(np.flatnonzero(fits)[-1])

    def loss_of(self, choice: IntArray) -> float:
        """Total loss of `choice` [L, E]."""
        return float(np.take_along_axis(self.loss, choice[..., None], axis=-1).sum())

    def bytes_of(self, choice: IntArray) -> int:
        """Total expert bytes of `choice` [L, E]."""
        return int(self.form_bytes[choice].sum())


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver found."""

    choice: IntArray
    """[L, E] form index of every expert."""
    loss: float
    expert_bytes: int
    gap: float = 0.0
    """At most this share of `loss` could still be won; 0 means proven optimal."""

    @classmethod
    def of(cls, problem: Problem, choice: IntArray, gap: float = 0.0) -> Solution:
        return cls(choice, problem.loss_of(choice), problem.bytes_of(choice), gap)


def smallest_choice(problem: Problem) -> IntArray | None:
    """[L, E] a choice with the fewest bytes that the rules allow; None where no choice does."""
    if problem.scope != "expert":
        return _smallest_uniform(problem)
    least, most = problem.group_bounds
    if (least > most).any():
        return None
    sizes = np.where(problem.allowed[..., 1:], problem.form_bytes[1:], np.iinfo(np.int64).max)
    return keep_cheapest(problem, sizes.argmin(axis=-1) + 1, sizes.min(axis=-1), least)


def smallest_bytes(problem: Problem) -> int | None:
    """Bytes of `smallest_choice`: any budget from here on can be met."""
    choice = smallest_choice(problem)
    return None if choice is None else problem.bytes_of(choice)


def keep_cheapest(
    problem: Problem, kept_form: IntArray, price: npt.NDArray[np.generic], count: IntArray
) -> IntArray:
    """[L, E] keep the `count[l]` experts of lowest `price` in each group, in their `kept_form`.

    Experts that must be kept come first, experts that cannot be kept come last, ties go to the
    lower expert id.
    """
    rank_class = np.where(problem.must_keep, 0, np.where(problem.can_keep, 1, 2))
    order = np.lexsort((problem.by_group(price), problem.by_group(rank_class)), axis=-1)
    rank = np.argsort(order, axis=-1)
    kept = (rank < count[:, None, None]).reshape(kept_form.shape)
    choice: IntArray = np.where(kept, kept_form, 0)
    return choice


def _smallest_uniform(problem: Problem) -> IntArray | None:
    count = int(problem.group_bounds[0].max())
    fits = problem.by_group(problem.allowed).sum(axis=2).min(axis=1) >= count  # [L, F]
    fits &= (problem.allowed | ~problem.must_keep[..., None]).all(axis=1)
    if problem.scope == "model":
        fits = np.broadcast_to(fits.all(axis=0), fits.shape)
    if not fits[:, 1:].any(axis=1).all():
        return None
    form = fits[:, 1:].argmax(axis=1) + 1  # [L] the first is the smallest
    in_form = np.take_along_axis(problem.allowed, form[:, None, None], axis=-1)[..., 0]
    kept_form = np.broadcast_to(form[:, None], in_form.shape)
    counts = np.full(problem.num_layers, count)
    return keep_cheapest(problem, kept_form, ~in_form, counts)
