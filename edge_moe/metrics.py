"""Quality of a model's logits: perplexity, and its distance from a reference model.

Names and definitions are those of llama.cpp's `llama-perplexity --kl-divergence`, where Q is the
model under test and base the reference. One difference: llama-perplexity scores the second half of
every window, here every token but a window's first is scored (nothing precedes that one).

Everything is in nats and float64. Error bars are one standard error over tokens, which are taken as
independent; `exact_match` and `paired_ratio` have their own. T tokens in a window, V vocabulary,
N = T - 1 scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Logits = npt.NDArray[np.floating]

CHUNK_VALUES = 2**21
"""Logits that are held in float64 at a time: 16 MiB per temporary."""


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    error: float

    def __format__(self, spec: str) -> str:
        """Both numbers in `spec`; without one, to the first two digits of the error."""
        if not spec:
            has_error = 0 < self.error < math.inf
            spec = f".{max(0, 1 - math.floor(math.log10(self.error)))}f" if has_error else ".4g"
        return f"{self.value:{spec}} ± {self.error:{spec}}"


@dataclass(frozen=True)
class Comparison:
    """How far Q is from base on the same tokens. KLD is the divergence KL(base || Q) per token."""

    ln_ppl_ratio: Estimate
    """Mean ln(PPL(Q)/PPL(base))."""
    ppl_ratio: Estimate
    """Mean PPL(Q)/PPL(base)."""
    mean_kld: Estimate
    median_kld: float
    kld_90: float
    """90 % of the tokens have a smaller KLD."""
    kld_95: float
    kld_99: float
    max_kld: float
    rms_delta_p: Estimate
    """Root mean square of p_Q - p_base, the probabilities of the token that really follows."""
    same_top_p: Estimate
    """Share of tokens for which both models find the same token most likely."""


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What remains of a window's logits: a few numbers per scored token, [N] each."""

    nll: FloatArray
    """-ln p_Q of the token that follows."""
    base_nll: FloatArray
    kld: FloatArray
    delta_p: FloatArray
    is_same_top: npt.NDArray[np.bool_]

    def split(self, num_tokens: int) -> tuple[TokenScores, TokenScores]:
        """The first `num_tokens` scored tokens, and the others."""
        cut = {name: np.split(values, [num_tokens]) for name, values in vars(self).items()}
        first, rest = ({name: parts[i] for name, parts in cut.items()} for i in (0, 1))
        return TokenScores(**first), TokenScores(**rest)

    @classmethod
    def join(cls, parts: Sequence[TokenScores]) -> TokenScores:
        """The scores of several windows, one after the other."""
        return cls(
            nll=np.concatenate([part.nll for part in parts]),
            base_nll=np.concatenate([part.base_nll for part in parts]),
            kld=np.concatenate([part.kld for part in parts]),
            delta_p=np.concatenate([part.delta_p for part in parts]),
            is_same_top=np.concatenate([part.is_same_top for part in parts]),
        )


def log_softmax(logits: Logits) -> FloatArray:
    """ln of the softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


@dataclass(frozen=True, eq=False)
class Reference:
    """What the reference model says about N tokens, prepared for many models beside it."""

    log_p: FloatArray
    """[N, V]"""
    p: FloatArray
    top: npt.NDArray[np.int64]
    """[N] most likely token."""

    @classmethod
    def of(cls, logits: Logits) -> Reference:
        log_p = log_softmax(logits)
        return cls(log_p, np.exp(log_p), log_p.argmax(axis=-1))

    def scores(self, logits: Logits, targets: npt.NDArray[np.int64]) -> TokenScores:
        """Scores of Q's `logits` [N, V] where `targets` [N] follow."""
        log_p = log_softmax(logits)
        nll, base_nll = -_pick(log_p, targets), -_pick(self.log_p, targets)
        is_same_top = log_p.argmax(axis=-1) == self.top
        with np.errstate(invalid="ignore"):  # 0 * (-inf - x) where base excludes a token
            difference = np.subtract(self.log_p, log_p, out=log_p)
            difference *= self.p
        np.copyto(difference, 0.0, where=self.p == 0)
        return TokenScores(
            nll=nll,
            base_nll=base_nll,
            kld=difference.sum(axis=-1),
            delta_p=np.exp(-nll) - np.exp(-base_nll),
            is_same_top=is_same_top,
        )


def row_chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """Rows of logits that are held in float64 at a time."""
    step = max(1, CHUNK_VALUES // vocab_size)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def token_nll(logits: Logits, token_ids: Sequence[int]) -> FloatArray:
    """-ln p of every token but the first; `logits` [T, V] follow the `token_ids` [T]. -> [N]"""
    targets = _targets(logits, token_ids)
    parts = [
        -_pick(log_softmax(logits[rows]), targets[rows])
        for rows in row_chunks(len(targets), logits.shape[-1])
    ]
    return np.concatenate(parts)


def compare_tokens(logits: Logits, base_logits: Logits, token_ids: Sequence[int]) -> TokenScores:
    """Scores of Q's `logits` [T, V] beside the reference's on one window."""
    if logits.shape != base_logits.shape:
        raise ValueError(f"logits {logits.shape} and reference {base_logits.shape} differ in shape")
    targets = _targets(logits, token_ids)
    parts = [
        Reference.of(base_logits[rows]).scores(logits[rows], targets[rows])
        for rows in row_chunks(len(targets), logits.shape[-1])
    ]
    return TokenScores.join(parts)


def mean_and_error(values: npt.ArrayLike) -> Estimate:
    """Mean and its standard error, sqrt((mean(x**2) - mean(x)**2) / (n - 1)).

    Raises:
        ValueError: fewer than two values have no error bar.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.size < 2:
        raise ValueError(f"an error bar needs at least two values, found {numbers.size}")
    return Estimate(float(numbers.mean()), float(numbers.std(ddof=1) / np.sqrt(numbers.size)))


def perplexity(nll: FloatArray) -> Estimate:
    """exp(mean of `nll`), with the error of the mean carried through the exponential."""
    return _exp(mean_and_error(nll))


def exact_match(is_correct: Sequence[bool]) -> Estimate:
    """Share of problems solved; its error is half the width of Wilson's interval at z = 1.

    n / (n + 1) * sqrt(p (1 - p) / n + 1 / (4 n^2)), from E. B. Wilson, "Probable Inference, the Law
    of Succession, and Statistical Inference", JASA 22 (1927). The standard error would be 0 where
    all problems are solved, or none, however few they are.

    Raises:
        ValueError: no problem at all.
    """
    count = len(is_correct)
    if count == 0:
        raise ValueError("a share of no problems")
    share = sum(map(bool, is_correct)) / count
    width = math.sqrt(share * (1 - share) / count + 1 / (4 * count**2))
    return Estimate(share, count / (count + 1) * width)


def paired_ratio(is_correct: Sequence[bool], base_is_correct: Sequence[bool]) -> Estimate:
    """Share of problems solved / share that the base solves, on the same problems.

    With s solved, b by the base, d by one of both alone: the first-order error s / b
    sqrt(d / (s b)), with half a problem added to each of the four cells of the table (A. Agresti,
    Y. Min, "Simple improved confidence intervals for comparing matched proportions", Statistics in
    Medicine 24 (2005)). Without that it would be 0 where both solve the same problems, however few.

    Raises:
        ValueError: not the same problems, or the base solves none.
    """
    pairs = list(zip(map(bool, is_correct), map(bool, base_is_correct), strict=True))
    solved, base = (sum(column) for column in zip(*pairs, strict=True)) if pairs else (0, 0)
    if base == 0:
        raise ValueError("a ratio to a score of zero")
    alone = sum(ours != its for ours, its in pairs) + 1
    error = math.sqrt(alone * (solved + 1) / (base + 1)) / (base + 1)
    return Estimate(solved / base, error)


def compare(scores: TokenScores) -> Comparison:
    """Sum up the scores of all windows."""
    # the error of a paired difference is llama-perplexity's sqrt(var_Q + var_base - 2 cov)
    ln_ratio = mean_and_error(scores.nll - scores.base_nll)
    median, kld_90, kld_95, kld_99 = np.quantile(scores.kld, (0.5, 0.9, 0.95, 0.99)).tolist()
    return Comparison(
        ln_ppl_ratio=ln_ratio,
        ppl_ratio=_exp(ln_ratio),
        mean_kld=mean_and_error(scores.kld),
        median_kld=median,
        kld_90=kld_90,
        kld_95=kld_95,
        kld_99=kld_99,
        max_kld=float(scores.kld.max()),
        rms_delta_p=_root(mean_and_error(scores.delta_p**2)),
        same_top_p=mean_and_error(scores.is_same_top),
    )


def _targets(logits: Logits, token_ids: Sequence[int]) -> npt.NDArray[np.int64]:
    """The token that follows each position but the last. [N]"""
    if logits.ndim != 2 or len(logits) != len(token_ids):
        raise ValueError(f"logits of shape {logits.shape} do not follow {len(token_ids)} tokens")
    return np.asarray(token_ids[1:], dtype=np.int64)


def _pick(log_p: FloatArray, targets: npt.NDArray[np.int64]) -> FloatArray:
    picked: FloatArray = log_p[np.arange(len(targets)), targets]
    return picked


def _exp(estimate: Estimate) -> Estimate:
    value = float(np.exp(estimate.value))
    return Estimate(value, value * estimate.error)


def _root(estimate: Estimate) -> Estimate:
    value = float(np.sqrt(estimate.value))
    return Estimate(value, estimate.error / (2 * value) if value else 0.0)
