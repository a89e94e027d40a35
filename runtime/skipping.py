"""Fewer experts per token: rules that say which of the router's choices are not worth computing.

NumPy on the router's own weights, so that the runtime and the trace simulator run the same rules.
T tokens of one forward pass, k top_k; w_0 is a token's largest weight, w_i another chosen one.

All three rules were published for top-2 or for other models, and are generalised alike:

- every chosen expert but the heaviest can be skipped, so a token never loses all of them;
- ratios are compared with one number per layer, the median over tokens and over i >= 1 of w_i / w_0
  (for top-2 the published median). On calibration text about half of the lighter choices go, and a
  lighter expert is never kept where a heavier one of the same token goes;
- under the ratio rules the rest is scaled so that a token's weights keep their sum, as published:
  where the router renormalises, this is choosing fewer experts in the first place.

Rules decide on weights rounded to float16, as a trace holds them: a replay skips the same experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_moe.errors import InputError
from edge_moe.runtime.allotment import open_source, source_fingerprint
from edge_moe.skip_calibration import SkipCalibration

PROTECTED_SHARE = 0.02
"""MC-MoE's default: this share of a prompt's tokens keeps all of its experts."""
RULE_NAMES = ("odp", "naee", "top-p=P")

Weights = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]


class SkipRule(ABC):
    """Decides, token by token, which chosen experts are left out."""

    name: str
    needs_token_norms = False
    """Whether `skips` looks at the tokens' L1 norms."""
    rescales = True
    """Whether the remaining weights of a token are scaled to their former sum."""

    def skips(self, layer: int, weights: Weights, token_norms: Weights | None = None) -> Mask:
        """[T, k] True where an expert is left out.

        Args:
            layer: index of the MoE layer.
            weights: [T, k] as the router gave them, in any order.
            token_norms: [T] L1 norm of each token's input to the MoE block.
        """
        rounded = weights.astype(np.float16).astype(np.float64)
        return self._skips(layer, rounded, token_norms)

    def remaining(self, weights: Weights, is_skipped: Mask) -> Weights:
        """[T, k] weights to compute with: 0 where an expert is left out."""
        if self.rescales:
            return rescaled_weights(weights, is_skipped)
        return np.where(is_skipped, 0, weights)

    @abstractmethod
    def _skips(self, layer: int, weights: Weights, token_norms: Weights | None) -> Mask: ...


class RatioRule(SkipRule):
    """NAEE's dynamic skipping (arXiv 2402.14800): skip expert i where w_i < beta_l w_0."""

    name = "naee"

    def __init__(self, ratios: Sequence[float]) -> None:
        """`ratios` are beta, one per MoE layer: the calibrated medians."""
        self._ratios = tuple(ratios)

    def _skips(self, layer: int, weights: Weights, token_norms: Weights | None) -> Mask:
        below: Mask = weights < self._ratios[layer] * weights.max(axis=1, keepdims=True)
        return below


class OnlineDynamicPruning(RatioRule):
    """MC-MoE's ODP (arXiv 2410.06270): the ratio rule, but important prompt tokens keep everything.

    The paper protects the 2 % of tokens with the largest I_j = |t_j|_1 x the mean attention that
    token j receives. A paged runtime has no attention maps (fused attention does not give them), so
    this is the proxy I_j = |t_j|_1 alone, t_j being the input of the MoE block, over the tokens of
    one prefill chunk, rounded up to one token. A step of a single token, as in decoding, is never
    protected: only the ratio rule runs, as in the paper.

    The released code differs from the paper: it sums attention over rows, which is always 1 (so it
    ranks by the norm too), and prunes only in ten hard-coded layers of Mixtral; here all layers do.
    """

    name = "odp"
    needs_token_norms = True

    def _skips(self, layer: int, weights: Weights, token_norms: Weights | None) -> Mask:
        is_skipped = super()._skips(layer, weights, token_norms)
        num_tokens = len(weights)
        if num_tokens > 1:
            if token_norms is None:
                raise ValueError("online dynamic pruning of a prompt needs the tokens' norms")
            num_protected = int(np.ceil(PROTECTED_SHARE * num_tokens))
            is_skipped[np.argsort(-token_norms, kind="stable")[:num_protected]] = False
        return is_skipped


class TopP(SkipRule):
    """Keep experts by descending weight until their share of the chosen weights exceeds p.

    The expert that crosses p is kept, so no token is ever without. Dynamic top-p (arXiv 2403.07652)
    takes p of the softmax over all experts and is trained that way; this is its post-hoc form on a
    top-k model, a different and lossy intervention: shares of the k chosen weights. Its code keeps
    one expert where the sum never exceeds p; here all are kept. As published, the rest is not
    scaled up: on the demo model that loses less (at p = 0.8, KL .0085 and .0099 on code and sql
    instead of .0112 and .0125, 1024 held-out tokens each).
    """

    rescales = False

    def __init__(self, share: float) -> None:
        """`share` is p, above 0 and at most 1.

        Raises:
            InputError: outside that range.
        """
        if not 0 < share <= 1:
            raise InputError(f"top-p={share:g} is out of range: use a number above 0, at most 1")
        self.name = f"top-p={share:g}"
        self._share = share

    def _skips(self, layer: int, weights: Weights, token_norms: Weights | None) -> Mask:
        is_skipped = np.zeros(weights.shape, dtype=np.bool_)
        if self._share == 1:  # rounding may carry a running sum above 1
            return is_skipped
        order = np.argsort(-weights, axis=1, kind="stable")
        ordered = np.take_along_axis(weights, order, axis=1)
        before = ordered.cumsum(axis=1) - ordered  # exactly 0 for the heaviest
        is_beyond = before > self._share * ordered.sum(axis=1, keepdims=True)
        np.put_along_axis(is_skipped, order, is_beyond, axis=1)
        return is_skipped


def rescaled_weights(weights: Weights, is_skipped: Mask) -> Weights:
    """[T, k] weights with the skipped ones 0, and the others scaled to the token's former sum.

    Tokens that skip nothing keep their weights bit for bit.
    """
    kept = np.where(is_skipped, 0, weights)
    touched = is_skipped.any(axis=1)
    before, after = weights[touched].sum(axis=1), kept[touched].sum(axis=1)
    scale = np.divide(before, after, out=np.ones_like(before), where=after > 0)
    kept[touched] *= scale[:, None]
    return kept


def median_ratio(weights: Weights) -> float:
    """Median over tokens and over i >= 1 of w_i / w_0, for [T, k] weights; 0 for top-1 models.

    A token whose weights are all zero is left out.
    """
    ordered = -np.sort(-weights.astype(np.float64), axis=1)
    ordered = ordered[ordered[:, 0] > 0]
    ratios = ordered[:, 1:] / ordered[:, :1]
    return float(np.median(ratios)) if ratios.size else 0.0


def parse_skip(text: str, calibration: SkipCalibration | None = None) -> SkipRule:
    """`"odp"`, `"naee"` or `"top-p=0.8"` as a rule; the first two need a calibration.

    Raises:
        InputError: unknown rule, p out of range, or no calibration where one is needed.
    """
    name, equals, value = text.partition("=")
    if name == "top-p" and equals:
        try:
            share = float(value)
        except ValueError:
            raise InputError(
                f"top-p={value!r} is not a number: write for example top-p=0.8"
            ) from None
        return TopP(share)
    rules = {"odp": OnlineDynamicPruning, "naee": RatioRule}
    if text not in rules:
        raise InputError(f"skipping rule {text!r} is unknown: use one of {', '.join(RULE_NAMES)}")
    if calibration is None:
        raise InputError(
            f"skipping rule {text!r} compares with calibrated medians: give --skip-calibration "
            "FILE, which `edge-moe calibrate-skipping` writes"
        )
    return rules[text](calibration.median_ratios)


def load_skip(text: str, calibration: Path | None, model: Path) -> SkipRule:
    """The rule that `text` names for `model`, with medians from the file `calibration`.

    Raises:
        InputError: as `parse_skip`, or `model` is no folder.
        StatsError: a calibration that is damaged or belongs to another model.
    """
    medians = SkipCalibration.load(calibration) if calibration is not None else None
    if medians is not None:
        medians.require_model(source_fingerprint(open_source(model)))
    return parse_skip(text, medians)
