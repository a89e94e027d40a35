"""GPTQ on block grids: a case by hand, loss against rounding to nearest, damping and fallback."""

from __future__ import annotations

import numpy as np
import pytest

from edge_moe.errors import FormError
from edge_moe.formats import FORM_NAMES, get_form
from edge_moe.formats.base import ByteArray, FloatArray
from edge_moe.formats.blocks import BlockForm
from edge_moe.formats.gptq import (
    InverseFactor,
    damped_factor,
    damping_shares,
    factor_inverse,
    gptq_pack,
    output_loss,
)
from edge_moe.formats.grid import CodeArray, Grid
from edge_moe.formats.quantise import MINIMUM_TOKENS, pack_matrix

BLOCK_FORMS = tuple(name for name in FORM_NAMES[1:] if get_form(name).block_size > 1)


class _Whole(BlockForm):
    """Whole numbers -2..2 in blocks of two: small enough to follow by hand."""

    name = "whole"
    label = "whole"
    block_size = 2
    block_bytes = 2
    sub_block = 2
    code_range = (-2, 2)

    def fit(
        self, blocks: FloatArray, importance: FloatArray | None = None
    ) -> tuple[Grid, CodeArray]:
        ones = np.ones((len(blocks), 1), np.float32)
        return Grid(ones[:, 0], ones), np.rint(blocks).clip(-2, 2).astype(np.int8)

    def join(self, grid: Grid, codes: CodeArray) -> ByteArray:
        return codes.view(np.uint8)

    def _unpack_blocks(self, packed: ByteArray) -> FloatArray:
        return packed.view(np.int8).astype(np.float32)


def _correlated(width: int, tokens: int, seed: int = 0) -> FloatArray:
    """[tokens, width] inputs with correlated columns of unequal size."""
    mixing = np.random.default_rng(99)
    matrix = 0.7 * mixing.standard_normal((width, width)) / np.sqrt(width) + 0.6 * np.eye(width)
    matrix *= np.exp(mixing.normal(0, 0.7, width))
    inputs = np.random.default_rng(seed).standard_normal((tokens, width))
    mixed: FloatArray = (inputs @ matrix).astype(np.float32)
    return mixed


def _weights(rows: int, width: int) -> FloatArray:
    values: FloatArray = np.random.default_rng(7).standard_normal((rows, width), np.float32)
    return values * np.float32(0.05)


def _loss(name: str, packed: ByteArray, weights: FloatArray, hessian: FloatArray) -> float:
    form = get_form(name)
    return output_loss(form.unpack(packed, weights.shape[1]) - weights, hessian)


def _factor(hessian: FloatArray, *dampings: float) -> InverseFactor:
    factor = damped_factor(hessian, dampings or (0.01,))
    assert factor is not None
    return factor


def test_two_columns_by_hand() -> None:
    # H^-1 = [[1, -1], [-1, 2]] = U^T U with U = [[1, -1], [0, 1]]: the first column's error of 0.4
    # is added to the second, 0.4 -> 0.8, which then rounds up
    hessian = np.array([[2.0, 1.0], [1.0, 1.0]], np.float32)
    factor = _factor(hessian, 0.0)
    assert factor.upper.tolist() == [[1.0, -1.0], [0.0, 1.0]]
    weights = np.array([[0.4, 0.4]], np.float32)
    form = _Whole()
    codes = form.unpack(gptq_pack(form, weights, factor), 2)
    assert codes.tolist() == [[0.0, 1.0]]
    assert output_loss(codes - weights, hessian) == pytest.approx(0.2)
    assert output_loss(-weights, hessian) == pytest.approx(0.8)  # rounded to nearest: 0, 0


def test_errors_cross_the_edge_of_a_block() -> None:
    hessian = np.array([[2, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]], np.float32)
    weights = np.array([[0.4, 0.0, 0.4, 0.0]], np.float32)
    form = _Whole()
    codes = form.unpack(gptq_pack(form, weights, _factor(hessian, 0.0)), 4)
    assert codes.tolist() == [[0.0, 0.0, 1.0, 0.0]]


def test_the_factor_inverts_the_damped_hessian() -> None:
    inputs = _correlated(64, 32)  # fewer tokens than columns: singular without damping
    hessian = inputs.T @ inputs
    factor = _factor(hessian)
    upper = factor.upper.astype(np.float64)
    damped = hessian + 0.01 * np.diagonal(hessian).mean() * np.eye(64)
    assert np.array_equal(upper, np.triu(upper))
    assert np.allclose(upper.T @ upper @ damped, np.eye(64), atol=1e-3)


@pytest.mark.parametrize("name", BLOCK_FORMS)
def test_output_loss_falls_for_every_form(name: str) -> None:
    weights = _weights(64, 512)
    seen, unseen = _correlated(512, 2048), _correlated(512, 2048, seed=1)
    packed = pack_matrix(name, weights, quantiser="gptq", hessian=seen.T @ seen)
    nearest = get_form(name).pack(weights)
    refitted = pack_matrix(name, weights, quantiser="gptq_refit", hessian=seen.T @ seen)
    assert packed.shape == nearest.shape and packed.dtype == np.uint8
    for inputs, share in ((seen, 0.75), (unseen, 0.8)):  # the weakest is ternary
        losses = [
            _loss(name, found, weights, inputs.T @ inputs) for found in (nearest, packed, refitted)
        ]
        assert losses[1] < share * losses[0]
        assert losses[2] < losses[1] * 1.001


@pytest.mark.parametrize("name", [name for name in BLOCK_FORMS if name != "q8_0"])
def test_independent_inputs_leave_a_weighted_search(name: str) -> None:
    weights = _weights(16, 512)
    squares = np.exp(np.random.default_rng(3).normal(0, 1, 512)).astype(np.float32)
    found = pack_matrix(name, weights, quantiser="gptq", hessian=np.diag(squares))
    expected = pack_matrix(
        name, weights, quantiser="weighted", input_squares=squares + 0.01 * squares.mean()
    )
    assert np.mean(found == expected) > 0.99  # ties and last bits of the importance


def test_damping_rises_until_the_hessian_can_be_inverted() -> None:
    barely = np.array([[1.0, 1.05], [1.05, 1.0]], np.float32)  # eigenvalue -0.05
    assert _factor(barely, 0.01, 0.03, 0.1).damping == 0.1
    assert _factor(np.eye(2, dtype=np.float32), 0.01, 0.1).damping == 0.01
    assert factor_inverse(np.array([[1.0, 2.0], [2.0, 1.0]])) is None
    assert factor_inverse(np.zeros((4, 4))) is None


def test_damping_grows_as_tokens_get_few() -> None:
    assert damping_shares(256, None) == (0.01, 0.03, 0.1)
    assert damping_shares(256, 10**6) == (0.01, 0.03, 0.1)
    assert damping_shares(256, 256)[0] == pytest.approx(0.3)
    assert damping_shares(256, 64)[0] == pytest.approx(1.2)


@pytest.mark.parametrize("name", ["tq1_0", "q2_k", "q4_k"])
def test_few_tokens_gain_on_unseen_text_with_that_damping_only(name: str) -> None:
    weights = _weights(64, 256)
    seen, unseen = _correlated(256, 128), _correlated(256, 2048, seed=1)
    losses = []
    for routed_tokens in (128, None):  # None: the paper's damping
        packed = pack_matrix(
            name,
            weights,
            quantiser="gptq_refit",
            hessian=seen.T @ seen,
            routed_tokens=routed_tokens,
        )
        losses.append(_loss(name, packed, weights, unseen.T @ unseen))
    nearest = _loss(name, get_form(name).pack(weights), weights, unseen.T @ unseen)
    assert losses[0] < nearest < losses[1]


@pytest.mark.parametrize(
    ("hessian", "routed_tokens"),
    [
        (np.zeros((256, 256)), None),
        (np.eye(256) - np.ones((256, 256)), None),
        (np.eye(256), MINIMUM_TOKENS - 1),
    ],
)
def test_rounds_to_nearest_where_the_moments_say_too_little(
    hessian: FloatArray, routed_tokens: int | None
) -> None:
    weights = _weights(4, 256)
    packed = pack_matrix(
        "q3_k", weights, quantiser="gptq", hessian=hessian, routed_tokens=routed_tokens
    )
    assert np.array_equal(packed, get_form("q3_k").pack(weights))


def test_an_input_that_was_never_seen_keeps_its_weights() -> None:
    inputs = _correlated(256, 1024)
    inputs[:, 17] = 0
    weights = _weights(8, 256)
    form = get_form("q6_k")
    packed = pack_matrix("q6_k", weights, quantiser="gptq", hessian=inputs.T @ inputs)
    found = form.unpack(packed, 256)[:, 17]
    assert np.abs(found - weights[:, 17]).max() < 0.01


def test_rows_do_not_touch_each_other() -> None:
    inputs = _correlated(256, 512)
    hessian, weights = inputs.T @ inputs, _weights(8, 256)
    whole = pack_matrix("q4_k", weights, quantiser="gptq", hessian=hessian)
    part = pack_matrix("q4_k", weights[2:4], quantiser="gptq", hessian=hessian)
    assert np.array_equal(whole[2:4], part)


def test_refuses_rows_that_are_not_whole_blocks() -> None:
    with pytest.raises(FormError, match="blocks of 256 weights; a row of 128"):
        pack_matrix("q4_k", _weights(2, 128), quantiser="gptq", hessian=np.eye(128))
