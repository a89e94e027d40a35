"""How an expert's matrices are rounded into a form: one seam, quantisers by name.

A quantiser chooses scales and codes; the bytes are those of the form whichever it is, so everything
that reads the form reads them all. What it may use of a matrix's input x, from calibration: the
sums of x_j^2 (`squares`) and of x x^T (`hessian`), over the expert's routed tokens. Only ratios
matter, so sums and means do alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from edge_moe.errors import InputError
from edge_moe.formats import ggml_library
from edge_moe.formats.base import DROP, ByteArray, FloatArray, get_form
from edge_moe.formats.blocks import BlockForm, require_weights
from edge_moe.formats.experts import split_form
from edge_moe.formats.gptq import InverseFactor, factor_inverse, gptq_pack, gptq_refit_pack
from edge_moe.formats.refit import refit_by_hessian, refit_by_squares
from edge_moe.formats.ternary import TERNARY_FORMS, absmean

Moments = npt.NDArray[np.floating]

BEST_QUANTISER = "gptq_refit"
"""Least error of the experts' outputs in every form, on held-out text of the demo model."""
MINIMUM_TOKENS = 16
"""Experts that fewer tokens reached are rounded to nearest where a hessian would decide: on the
demo model 16 tokens are enough to gain by it, 8 are not."""


@dataclass(frozen=True)
class InputMoments:
    """What calibration knows about the input of one matrix."""

    squares: Moments | None = None
    """[width]"""
    hessian: Moments | None = None
    """[width, width]"""
    routed_tokens: int | None = None
    """Tokens behind the sums; None is taken as enough."""

    @cached_property
    def factor(self) -> InverseFactor | None:
        """GPTQ's factor of the hessian, or None: too few tokens, or no damping is enough."""
        if self.hessian is None or self.has_too_few_tokens:
            return None
        return factor_inverse(self.hessian, self.routed_tokens)

    @property
    def has_too_few_tokens(self) -> bool:
        """Whether a hessian of so few tokens should decide nothing."""
        return self.routed_tokens is not None and self.routed_tokens < MINIMUM_TOKENS

    def diagonal(self) -> FloatArray:
        """[width] `squares`, or the hessian's diagonal where only that is there."""
        found = self.squares
        if found is None:
            assert self.hessian is not None
            found = np.diagonal(self.hessian)
        return np.ascontiguousarray(found, dtype=np.float32)

    def check(self, width: int) -> None:
        """Raise `InputError` unless the moments are finite and belong to rows of `width`."""
        for name, found, shape in (
            ("squares", self.squares, (width,)),
            ("hessian", self.hessian, (width, width)),
        ):
            if found is None:
                continue
            if found.shape != shape or not np.isfinite(found).all():
                raise InputError(
                    f"input {name} of a matrix with rows of {width} weights have shape "
                    f"{found.shape}, or hold NaN: expected finite numbers of shape {shape}"
                )


@dataclass(frozen=True)
class Quantiser:
    """One way to choose scales and codes."""

    name: str
    summary: str
    pack: Callable[[BlockForm, FloatArray, InputMoments], ByteArray]
    """(form, weights [rows, width], moments) -> [rows, row_bytes]."""
    needs: tuple[str, ...] = ()
    """Fields of `InputMoments`, any one of which is enough."""
    forms: tuple[str, ...] | None = None
    """Block forms it can pack; None is all of them."""
    uses_every_token: bool = False
    """Whether moments are of every token, by the router's score, and not of routed ones alone."""

    def packs(self, form: str) -> bool:
        """Whether it can pack `form`; forms without codes need no quantiser."""
        if self.forms is None or form == DROP:
            return True
        parts = split_form(form)
        return all(
            part in self.forms or not isinstance(get_form(part), BlockForm) for part in parts
        )


QUANTISERS: dict[str, Quantiser] = {}


def get_quantiser(name: str) -> Quantiser:
    """The quantiser called `name`.

    Raises:
        InputError: unknown name, with the known ones.
    """
    if name not in QUANTISERS:
        raise InputError(f"quantiser {name!r} is unknown: use one of {', '.join(QUANTISERS)}")
    return QUANTISERS[name]


def pack_matrix(
    form: str,
    weights: FloatArray,
    *,
    quantiser: str = "nearest",
    input_squares: Moments | None = None,
    hessian: Moments | None = None,
    routed_tokens: int | None = None,
) -> ByteArray:
    """`weights` [rows, width] in `form`, rounded by `quantiser`: [rows, row_bytes] uint8.

    Raises:
        InputError: unknown quantiser, one that does not fit the form, or moments that are missing.
        FormError: weights that the form cannot hold.
        MissingExtraError: `imatrix` without llama-cpp-python.
    """
    moments = InputMoments(input_squares, hessian, routed_tokens)
    return _pack(form, weights, get_quantiser(quantiser), moments)


def pack_expert_with(
    form: str,
    gate: FloatArray,
    up: FloatArray,
    down: FloatArray,
    quantiser: str = "nearest",
    *,
    input_squares: Moments | None = None,
    inner_squares: Moments | None = None,
    hessians: tuple[Moments, Moments] | None = None,
    routed_tokens: int | None = None,
) -> ByteArray:
    """One expert as flat bytes, like `edge_moe.formats.pack_expert`, rounded by `quantiser`.

    Args:
        gate, up: [I, H]; `input_squares` [H] and `hessians[0]` [H, H] are of their input.
        down: [H, I]; `inner_squares` [I] and `hessians[1]` [I, I] are of its input.
        routed_tokens: tokens behind those sums.

    Raises: as `pack_matrix`.
    """
    outer_hessian, inner_hessian = hessians if hessians is not None else (None, None)
    outer = InputMoments(input_squares, outer_hessian, routed_tokens)
    inner = InputMoments(inner_squares, inner_hessian, routed_tokens)
    found = get_quantiser(quantiser)
    parts = split_form(form)
    matrices = [(parts[0], gate, outer), (parts[1], up, outer), (parts[2], down, inner)]
    if parts[0] == parts[1]:  # rows do not know each other
        matrices[:2] = [(parts[0], np.concatenate([gate, up]), outer)]
    return np.concatenate(
        [_pack(part, matrix, found, known).reshape(-1) for part, matrix, known in matrices]
    )


def _pack(name: str, weights: FloatArray, quantiser: Quantiser, moments: InputMoments) -> ByteArray:
    form = get_form(name)
    if not isinstance(form, BlockForm):
        return form.pack(weights)  # 16 and 32 bits: nothing to choose
    if not quantiser.packs(name):
        raise InputError(
            f"quantiser {quantiser.name!r} packs {', '.join(quantiser.forms or ())}, not {name}: "
            "use nearest, imatrix, weighted, refit, gptq or gptq_refit"
        )
    if quantiser.needs and all(getattr(moments, field) is None for field in quantiser.needs):
        raise InputError(
            f"quantiser {quantiser.name!r} needs the {' or '.join(quantiser.needs)} of each "
            "matrix's input, and there are none: calibrate for them, or use nearest"
        )
    form.row_bytes(weights.shape[1])
    require_weights(form, weights)
    moments.check(weights.shape[1])
    return quantiser.pack(form, weights, moments)


def _nearest(form: BlockForm, weights: FloatArray, moments: InputMoments) -> ByteArray:
    return form.pack(weights)


def _imatrix(form: BlockForm, weights: FloatArray, moments: InputMoments) -> ByteArray:
    if form.name == "q8_0":
        return form.pack(weights)  # ggml has no weighted search for it
    if form.ggml_type is None:
        return _weighted(form, weights, moments)
    importance = moments.diagonal()
    if form.name in TERNARY_FORMS:
        return _refit(form, weights, InputMoments(squares=importance))
    if not importance.any():
        return ggml_library.quantize_chunk(form, weights, np.ones_like(importance))
    return ggml_library.quantize_chunk(form, weights, importance)


def _weighted(form: BlockForm, weights: FloatArray, moments: InputMoments) -> ByteArray:
    importance = moments.diagonal()
    parts = []
    for start in range(0, weights.shape[1], form.block_size):
        columns = slice(start, start + form.block_size)
        parts.append(form.join(*form.fit_all(weights[:, columns], importance[columns])))
    return np.concatenate(parts, axis=1)


def _gptq(form: BlockForm, weights: FloatArray, moments: InputMoments) -> ByteArray:
    factor = moments.factor
    return form.pack(weights) if factor is None else gptq_pack(form, weights, factor)


def _gptq_refit(form: BlockForm, weights: FloatArray, moments: InputMoments) -> ByteArray:
    factor, hessian = moments.factor, moments.hessian
    if factor is None or hessian is None:
        return form.pack(weights)
    return gptq_refit_pack(form, weights, factor, hessian)


def _absmean(form: BlockForm, weights: FloatArray, moments: InputMoments) -> ByteArray:
    return form.join(*absmean(weights.reshape(-1, form.block_size))).reshape(len(weights), -1)


def _refit(form: BlockForm, weights: FloatArray, moments: InputMoments) -> ByteArray:
    if moments.hessian is not None and moments.has_too_few_tokens:
        return form.pack(weights)
    grid, codes = form.fit_all(weights.reshape(-1, form.block_size))
    rows = codes.reshape(weights.shape)
    if moments.hessian is None:
        grid = refit_by_squares(weights, grid, rows, moments.diagonal())
    else:
        grid = refit_by_hessian(weights, grid, rows, moments.hessian)
    return form.join(grid, codes).reshape(len(weights), -1)


_SEEN, _HESSIAN = ("squares", "hessian"), ("hessian",)

for _quantiser in (
    Quantiser("nearest", "the form's own search for least squared error", _nearest),
    Quantiser("imatrix", "ggml's search, errors weighted by the input's squares", _imatrix, _SEEN),
    Quantiser("weighted", "the form's own search, weighted by the same squares", _weighted, _SEEN),
    Quantiser("refit", "nearest's codes, scales for least output error", _refit, _SEEN),
    Quantiser("gptq", "later columns make up the rounding of earlier ones", _gptq, _HESSIAN),
    Quantiser("gptq_refit", "gptq's codes, scales for least output error", _gptq_refit, _HESSIAN),
    Quantiser(
        "gptq_refit_all",
        "gptq_refit with every token sent through every expert",
        _gptq_refit,
        _HESSIAN,
        uses_every_token=True,
    ),
    Quantiser("absmean", "ternary with d = mean |w|", _absmean, forms=TERNARY_FORMS),
    Quantiser("lloyd", "ternary of least squared error", _nearest, forms=TERNARY_FORMS),
):
    QUANTISERS[_quantiser.name] = _quantiser
