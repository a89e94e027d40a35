"""Which experts matter: the field's criteria, each a few lines over `ExpertStats`.

A criterion gives [L, E] scores, larger meaning more worth keeping; they are compared inside a
layer. Letters as in `edge_moe.stats`: g the real weight, f the un-gated output, n an expert's
routed tokens, T all tokens. Super experts are not ranked: `keep_largest` keeps them first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_moe.errors import InputError
from edge_moe.stats import ExpertStats
from edge_moe.super_experts import find_super_experts

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
Score = Callable[[ExpertStats], FloatArray]

RANDOM_SEED = 0
PMQ_ALPHA, PMQ_BETA = 1.0, 1.5
"""Exponents of frequency and weight: the defaults of MC-MoE's released code."""


@dataclass(frozen=True)
class Criterion:
    """A registered score."""

    name: str
    formula: str
    source: str
    score: Score


CRITERIA: dict[str, Criterion] = {}
"""Name -> criterion, in the order of registration."""


def register(name: str, formula: str, source: str) -> Callable[[Score], Score]:
    """Decorator: make a function of the statistics available by name."""

    def add(score: Score) -> Score:
        if name in CRITERIA:
            raise ValueError(f"criterion {name} is registered twice")
        CRITERIA[name] = Criterion(name, formula, source, score)
        return score

    return add


def saliency(stats: ExpertStats, name: str) -> FloatArray:
    """[L, E] scores of criterion `name`.

    Raises:
        InputError: unknown name, with the known ones.
    """
    if name not in CRITERIA:
        raise InputError(f"criterion {name!r} is unknown; known are {', '.join(CRITERIA)}")
    return CRITERIA[name].score(stats)


def keep_largest(
    scores: FloatArray,
    num_kept: int | IntArray,
    protected: BoolArray | None = None,
    num_groups: int = 1,
) -> BoolArray:
    """[L, E] the `num_kept` experts of largest score in every layer; ties go to the lower id.

    `num_kept` may differ from layer to layer, [L]. A group-limited router's `num_groups` runs of
    consecutive experts keep equally many each.

    `protected` experts [L, E] come first, whatever their score.

    Raises:
        InputError: a layer, or a group of it, protects more experts than it may keep, or has fewer;
            or `num_kept` is no multiple of `num_groups`.
    """
    counts = np.broadcast_to(num_kept, scores.shape[:1])
    if num_groups > 1:
        if (counts % num_groups).any():
            raise InputError(f"cannot keep {num_kept} experts in {num_groups} equal groups")
        by_group = len(scores) * num_groups, scores.shape[1] // num_groups
        part = None if protected is None else protected.reshape(by_group)
        per_group = np.repeat(counts // num_groups, num_groups)
        return keep_largest(scores.reshape(by_group), per_group, part).reshape(scores.shape)
    if (counts < 1).any() or (counts > scores.shape[1]).any():
        raise InputError(f"cannot keep {num_kept} of {scores.shape[1]} experts")
    if protected is None:
        protected = np.zeros(scores.shape, np.bool_)
    num_protected = protected.sum(axis=1)
    worst = int((num_protected - counts).argmax())
    if num_protected[worst] > counts[worst]:
        raise InputError(
            f"a layer has {num_protected[worst]} super experts, but only {counts[worst]} may "
            "stay: keep more"
        )
    order = np.lexsort((-scores, ~protected), axis=1)
    kept = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(kept, order, np.arange(scores.shape[1]) < counts[:, None], axis=1)
    return kept


def keep_by_criterion(stats: ExpertStats, name: str, num_kept: int) -> BoolArray:
    """[L, E] what criterion `name` keeps, super experts found and protected before it ranks."""
    return keep_largest(saliency(stats, name), num_kept, find_super_experts(stats.max_output))


def _sums(stats: ExpertStats, name: str) -> FloatArray:
    return stats.expert_sums[name].values()


def _per_token(stats: ExpertStats, name: str) -> FloatArray:
    """Mean over the routed tokens; 0 for an expert that no token chose."""
    return _sums(stats, name) / np.maximum(stats.routed_tokens, 1)


@register("frequency", "n", "the common baseline, e.g. arXiv 2310.01334")
def frequency(stats: ExpertStats) -> FloatArray:
    return stats.routed_tokens.astype(np.float64)


@register("weighted-frequency", "sum g", "siblings of REAP, arXiv 2510.13999")
def weighted_frequency(stats: ExpertStats) -> FloatArray:
    return _sums(stats, "gate")


@register("ean", "sum |f|", "expert activation norm, arXiv 2510.13999")
def ean(stats: ExpertStats) -> FloatArray:
    return _sums(stats, "output_norm")


@register("reap", "mean g |f|", "arXiv 2510.13999")
def reap(stats: ExpertStats) -> FloatArray:
    """The released observer recomputes softmax and top-k from raw logits for every architecture;
    here g is the weight that the layer really used, renormalised where the model does so."""
    return _per_token(stats, "gated_norm")


@register("man", "mean |f|", "mean activation norm, arXiv 2606.15716")
def man(stats: ExpertStats) -> FloatArray:
    return _per_token(stats, "output_norm")


@register("msan", "mean |f|**2", "mean squared activation norm, arXiv 2606.15716")
def msan(stats: ExpertStats) -> FloatArray:
    return _per_token(stats, "output_square")


@register("easy-ep", "sum s g |f|", "arXiv 2504.06792")
def easy_ep(stats: ExpertStats) -> FloatArray:
    """A sum, not a mean: frequency counts. s weighs tokens by how far the layer turns them."""
    return _sums(stats, "shifted_norm")


@register("tcess-released", "sum of top-1 raw logits / T", "PreMoe as released, arXiv 2505.17639")
def tcess_released(stats: ExpertStats) -> FloatArray:
    """Raw logits may be negative: a chosen expert can then rank below one that never was."""
    return _sums(stats, "top_logit") / max(1, stats.info.num_tokens)


@register("tcess", "sum of top-1 scores / T", "PreMoe, arXiv 2505.17639, repaired")
def tcess(stats: ExpertStats) -> FloatArray:
    """Probabilities (softmax or sigmoid) instead of raw logits, where the layer's own choice, with
    its correction bias and groups, gave the expert the largest weight."""
    return _sums(stats, "top_score") / max(1, stats.info.num_tokens)


@register("pmq", "phi**alpha w**beta", "MC-MoE, arXiv 2410.06270, without its quantisation error")
def pmq(stats: ExpertStats) -> FloatArray:
    """phi = n / T; w = sum of the chosen experts' router scores before renormalisation / T."""
    num_tokens = max(1, stats.info.num_tokens)
    frequency_share = stats.routed_tokens / num_tokens
    weight: FloatArray = _sums(stats, "router_score") / num_tokens
    return frequency_share**PMQ_ALPHA * weight**PMQ_BETA


@register("random", "uniform noise", "the control")
def random(stats: ExpertStats) -> FloatArray:
    return random_scores(stats, RANDOM_SEED)


def random_scores(stats: ExpertStats, seed: int) -> FloatArray:
    """[L, E] uniform noise."""
    return np.random.default_rng(seed).random(stats.routed_tokens.shape)
