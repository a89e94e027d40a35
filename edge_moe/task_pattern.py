"""`TaskPattern`: how much each expert matters to a task, small enough to ship; and its retrieval.

PreMoe (arXiv 2505.17639) retrieves, for a prompt, the expert sets of the nearest known task. Its
released form compares raw selected router logits at the FIRST MoE layer only, by L2 distance.
Here the vectors are the weights the layers really multiply with, of ALL MoE layers one after
another, compared by cosine; first-layer vectors of similar tasks lie close together.

L MoE layers, E experts. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

import edge_moe
from edge_moe.errors import InputError, StatsError
from edge_moe.files import write_text
from edge_moe.json_files import checked, parse_json
from edge_moe.stats import ExpertStats

TASK_PATTERN_VERSION = 1
GENERAL = "general"
"""The pattern of all tasks together, for prompts that none of them fits."""
COVERAGE = 0.9
"""Kept experts take at least this share of each layer's routed weight."""
MARGIN = 0.05
"""The best cosine must exceed every other one, the general pattern's included, by this much. Taken
before anything was measured."""
FLOOR = 0.7
"""The best cosine must reach this. Chosen from six values after looking at the demo model's
held-out prompts, and then at calibration text, which agree: with it fewer prompts get their task
(calibration text, first 32 tokens: 91.3 % instead of 92.0 %), but of prompts of a task without a
pattern 87 % instead of 54 % fall back. Rates on those held-out prompts are a little flattered."""
_LEVELS = 255

FloatArray64 = npt.NDArray[np.float64]


class TaskPattern(BaseModel):
    """One file of `profiles/tasks`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = TASK_PATTERN_VERSION
    edge_moe_version: str
    name: str
    tasks: tuple[str, ...]
    """Labels of the texts that were measured."""
    model_type: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    data_fingerprints: tuple[str, ...]
    num_tokens: int
    moe_layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int
    coverage: float = Field(gt=0, le=1)
    """Share of each layer's weight that `kept` takes at least."""
    unit: float = Field(gt=0)
    """Router weight per token that one step of a score stands for."""
    scores: tuple[tuple[Annotated[int, Field(ge=0, le=_LEVELS)], ...], ...]
    """[L][E] weight per token, summed over the tokens that chose the expert, in steps of `unit`."""
    kept: tuple[tuple[int, ...], ...]
    """[L] ids of the experts to load when no budget says how many; ascending."""

    def weights(self) -> FloatArray64:
        """[L, E] router weight per token."""
        return np.array(self.scores, dtype=np.float64) * self.unit

    def save(self, path: Path) -> None:
        """Write the file atomically: a field per line, and a layer per line."""
        fields = self.model_dump(mode="json")
        write = {"scores": _layers, "kept": _layers}
        lines = [
            f" {json.dumps(name)}: {write.get(name, json.dumps)(value)}"
            for name, value in fields.items()
        ]
        write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def parse(cls, text: str, source: str) -> TaskPattern:
        """Read what `save` wrote; `source` names it in errors.

        Raises:
            StatsError: damaged, or written by another version.
        """
        what, remedy = f"task pattern {source}", "run `edge-moe patterns` again"
        raw = parse_json(text, what, StatsError, remedy)
        versions = (TASK_PATTERN_VERSION,)
        pattern = checked(raw, cls, what, versions=versions, again=remedy, kind=StatsError)
        if problem := pattern._problem():
            raise StatsError(f"{what} is damaged: {problem}: {remedy}")
        return pattern

    def _problem(self) -> str | None:
        """What contradicts itself, if anything does."""
        num_layers = len(self.moe_layer_ids)
        if len(self.scores) != num_layers or len(self.kept) != num_layers:
            return f"scores or kept sets do not cover {num_layers} layers"
        for scores, kept in zip(self.scores, self.kept, strict=True):
            if len(scores) != self.num_experts:
                return f"{len(scores)} scores for {self.num_experts} experts"
            if list(kept) != sorted(set(kept)) or not set(kept) <= set(range(self.num_experts)):
                return f"kept set {list(kept)} is not ascending expert ids"
            if len(kept) < self.top_k:
                return f"{len(kept)} kept experts are fewer than top_k={self.top_k}"
        return None


@dataclass(frozen=True)
class Match:
    """Which pattern a prompt was matched with, and how clearly."""

    chosen: str
    cosines: dict[str, float]
    """By pattern, the highest first."""
    is_fallback: bool
    """No pattern was clearly the best, so the general one was chosen."""

    def describe(self) -> str:
        """One line for people."""
        ranked = ", ".join(f"{name} {cosine:.3f}" for name, cosine in self.cosines.items())
        if self.is_fallback:
            return (
                f"task: {self.chosen}, for no other reaches {FLOOR:g} and is {MARGIN:g} above the "
                f"rest (cosine {ranked})"
            )
        return f"task: {self.chosen} (cosine {ranked})"


def match_pattern(
    query: FloatArray64,
    patterns: Mapping[str, TaskPattern],
    *,
    margin: float = MARGIN,
    floor: float = FLOOR,
) -> Match:
    """The pattern nearest to `query` [L, E], the mean router weights of a prompt.

    Falls back to `GENERAL`, where there is one, unless the best cosine is at least `floor` and
    exceeds every other by `margin`: a prompt of no known task is nearest to the mean of all, or to
    none in particular, or to none at all.

    Raises:
        InputError: no pattern at all.
    """
    if not patterns:
        raise InputError("no task pattern is known for this model: make some, `edge-moe patterns`")
    found = {name: cosine(query, pattern.weights()) for name, pattern in patterns.items()}
    ranked = dict(sorted(found.items(), key=lambda item: -item[1]))
    best, *others = ranked
    is_clear = ranked[best] >= floor
    is_clear &= all(ranked[best] - ranked[other] >= margin for other in others)
    if best == GENERAL or is_clear or GENERAL not in patterns:
        return Match(best, ranked, is_fallback=best == GENERAL)
    return Match(GENERAL, ranked, is_fallback=True)


def cosine(first: FloatArray64, second: FloatArray64) -> float:
    """Cosine of two arrays taken as one long vector each; 0 where one of them is zero."""
    length = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float((first * second).sum()) / length if length else 0.0


def make_pattern(
    name: str, parts: Sequence[ExpertStats], coverage: float = COVERAGE, num_groups: int = 1
) -> TaskPattern:
    """The pattern of the texts behind `parts` together; every token counts the same.

    `num_groups` keeps equally many experts in every group of a group-limited router.

    Raises:
        InputError: no statistics, or a coverage outside (0, 1].
        StatsError: statistics of different models.
    """
    if not parts:
        raise InputError(f"pattern {name!r} has no statistics: give --stats {name}=DIR")
    if not 0 < coverage <= 1:
        raise InputError(f"coverage {coverage:g} is out of range: use a share above 0, at most 1")
    info = parts[0].info
    for part in parts[1:]:
        if part.info.model_fingerprint != info.model_fingerprint:
            raise StatsError(
                f"pattern {name!r}: statistics of two models ({info.model_fingerprint[:12]} and "
                f"{part.info.model_fingerprint[:12]}): calibrate the same one"
            )
    num_tokens = sum(part.info.num_tokens for part in parts)
    gates = np.stack([part.expert_sums["gate"].values() for part in parts])
    weights = gates.sum(axis=0) / num_tokens
    unit = float(np.max(weights)) / _LEVELS
    if not unit > 0:
        raise StatsError(f"pattern {name!r}: no token was routed to any expert: calibrate again")
    return TaskPattern(
        edge_moe_version=edge_moe.__version__,
        name=name,
        tasks=tuple(dict.fromkeys(task for part in parts for task in part.info.tasks)),
        model_type=info.model_type,
        model_fingerprint=info.model_fingerprint,
        tokenizer_fingerprint=info.tokenizer_fingerprint,
        data_fingerprints=tuple(part.info.data_fingerprint for part in parts),
        num_tokens=num_tokens,
        moe_layer_ids=info.moe_layer_ids,
        num_experts=info.num_experts,
        top_k=info.top_k,
        coverage=coverage,
        unit=unit,
        scores=tuple(tuple(row) for row in np.rint(weights / unit).astype(int).tolist()),
        kept=tuple(_covering(row, coverage, info.top_k, num_groups) for row in weights),
    )


def _covering(
    weights: FloatArray64, coverage: float, top_k: int, num_groups: int
) -> tuple[int, ...]:
    """Ids of the fewest experts with `coverage` of the weight, equally many in every group."""
    ranked = rank_by_group(weights, num_groups)
    shares = weights[ranked].sum(axis=1).cumsum() / max(float(weights.sum()), 1e-300)
    enough = int(np.searchsorted(shares, coverage - 1e-12)) + 1
    least = top_k if num_groups == 1 else max(top_k, 2)
    return tuple(sorted(ranked[: max(enough, least)].flatten().tolist()))


def rank_by_group(scores: FloatArray64, num_groups: int) -> npt.NDArray[np.int64]:
    """[E / groups, groups] ids: row r holds the r-th best expert of every group.

    With one group this is the plain order. Keeping whole rows keeps the groups equal, as
    group-limited routers need.
    """
    by_group = scores.reshape(num_groups, -1)
    order = np.argsort(-by_group, axis=1, kind="stable")
    starts = np.arange(num_groups)[:, None] * by_group.shape[1]
    ranked: npt.NDArray[np.int64] = (order + starts).T
    return ranked


def _layers(rows: Sequence[Sequence[int]]) -> str:
    return "[\n" + ",\n".join(f"  {json.dumps(list(row))}" for row in rows) + "\n ]"
