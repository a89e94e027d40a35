"""Quantisers: reference errors, agreement with libggml, refits against solvers, refusals."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from edge_moe.errors import FormError, InputError, MissingExtraError
from edge_moe.formats import (
    FORM_NAMES,
    get_form,
    ggml_library,
    pack_expert,
    split_form,
    unpack_expert,
)
from edge_moe.formats.base import ByteArray, FloatArray
from edge_moe.formats.blocks import BlockForm
from edge_moe.formats.gptq import output_loss
from edge_moe.formats.grid import CodeArray, Grid
from edge_moe.formats.quantise import QUANTISERS, get_quantiser, pack_expert_with, pack_matrix
from edge_moe.formats.refit import refit_by_hessian, refit_by_squares
from edge_moe.formats.ternary import absmean

BLOCK_FORMS = tuple(name for name in FORM_NAMES[1:] if get_form(name).block_size > 1)
GGML_WEIGHTED = ("q2_k", "q3_k", "q4_0", "q4_k", "q5_k", "q6_k")
TERNARY = ("tq1_0", "tq2_0")


def _gaussian(rows: int, width: int, seed: int = 0) -> FloatArray:
    weights: FloatArray = np.random.default_rng(seed).standard_normal((rows, width), np.float32)
    return weights


def _squares(width: int, seed: int = 1) -> FloatArray:
    values: FloatArray = np.exp(np.random.default_rng(seed).normal(0, 1.2, width))
    return values.astype(np.float32)


def _error(name: str, packed: ByteArray, weights: FloatArray, squares: FloatArray) -> float:
    """sum_j m_j (w_j - q_j)^2 as a share of sum_j m_j w_j^2."""
    difference = get_form(name).unpack(packed, weights.shape[1]) - weights
    return float((squares * difference**2).sum() / (squares * weights**2).sum())


def _relative(difference: FloatArray, weights: FloatArray) -> float:
    return float(np.linalg.norm(difference) / np.linalg.norm(weights))


@cache
def _ggml() -> ctypes.CDLL:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python brings libggml")
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library


# ---------------------------------------------------------------------------- reference errors


def test_ternary_errors_on_gaussian_weights() -> None:
    weights = _gaussian(256, 1024)
    blocks = weights.reshape(-1, 256)
    grid, codes = absmean(blocks)
    assert _relative(grid.values(codes) - blocks, blocks) == pytest.approx(0.512, abs=0.002)
    assert np.mean(codes == 0) == pytest.approx(0.310, abs=0.005)

    refitted = refit_by_squares(weights, grid, codes.reshape(weights.shape), np.ones(1024))
    assert _relative(refitted.values(codes) - blocks, blocks) == pytest.approx(0.460, abs=0.002)


@pytest.mark.parametrize("name", TERNARY)
def test_ternary_quantisers_on_gaussian_weights(name: str) -> None:
    weights, uniform = _gaussian(256, 1024), np.ones(1024, np.float32)
    expected = {"absmean": 0.512, "lloyd": 0.434, "nearest": 0.434, "refit": 0.434}
    for quantiser, error in expected.items():
        packed = pack_matrix(name, weights, quantiser=quantiser, input_squares=uniform)
        assert _error(name, packed, weights, uniform) ** 0.5 == pytest.approx(error, abs=0.002)


def test_ggmls_own_ternary_rule_zeroes_nearly_everything() -> None:
    if not ggml_library.is_installed():
        pytest.skip("llama-cpp-python brings libggml")
    weights, form = _gaussian(256, 1024), get_form("tq2_0")
    unpacked = form.unpack(ggml_library.quantize_chunk(form, weights, None), 1024)
    assert _relative(unpacked - weights, weights) == pytest.approx(0.807, abs=0.003)
    assert np.mean(unpacked == 0) == pytest.approx(0.866, abs=0.005)


@pytest.mark.parametrize("name", TERNARY)
@pytest.mark.parametrize(
    "quantiser", ["nearest", "lloyd", "refit", "imatrix", "weighted", "gptq", "gptq_refit"]
)
def test_weights_that_are_ternary_already_pass_through(name: str, quantiser: str) -> None:
    rng = np.random.default_rng(2)
    scale = rng.uniform(0.01, 0.2, (8, 2, 1)).astype(np.float16).astype(np.float32)
    weights = (rng.integers(-1, 2, (8, 2, 256)) * scale).reshape(8, 512).astype(np.float32)
    inputs = rng.standard_normal((2048, 512))
    hessian = inputs.T @ inputs
    packed = pack_matrix(
        name, weights, quantiser=quantiser, input_squares=np.diagonal(hessian), hessian=hessian
    )
    assert np.array_equal(get_form(name).unpack(packed, 512), weights)


# ---------------------------------------------------------------------------- weighted searches


@pytest.mark.parametrize("name", GGML_WEIGHTED)
def test_imatrix_equals_libggml_byte_for_byte(name: str) -> None:
    library, form = _ggml(), get_form(name)
    weights, squares = _gaussian(32, 768), _squares(768)
    expected = np.empty((32, form.row_bytes(768)), dtype=np.uint8)
    library.ggml_quantize_chunk(
        form.ggml_type,
        weights.ctypes.data,
        expected.ctypes.data,
        0,
        32,
        768,
        squares.ctypes.data,
    )
    found = pack_matrix(name, weights, quantiser="imatrix", input_squares=squares)
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, get_form(name).pack(weights))


@pytest.mark.parametrize("name", GGML_WEIGHTED)
def test_the_own_weighted_search_is_no_worse_than_ggmls(name: str) -> None:
    if not ggml_library.is_installed():
        pytest.skip("llama-cpp-python brings libggml")
    weights, squares = _gaussian(64, 1024), _squares(1024)
    errors = {
        quantiser: _error(
            name,
            pack_matrix(name, weights, quantiser=quantiser, input_squares=squares),
            weights,
            squares,
        )
        for quantiser in ("nearest", "imatrix", "weighted")
    }
    assert errors["weighted"] <= errors["imatrix"] < errors["nearest"]


@pytest.mark.parametrize("name", [*TERNARY, "q2_0"])
def test_ternary_weighted_errors_fall_from_nearest_to_refit_to_weighted(name: str) -> None:
    weights, squares = _gaussian(64, 1024), _squares(1024)
    errors = [
        _error(
            name,
            pack_matrix(name, weights, quantiser=quantiser, input_squares=squares),
            weights,
            squares,
        )
        for quantiser in ("nearest", "imatrix", "weighted")
    ]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == 3


@pytest.mark.parametrize("name", BLOCK_FORMS)
def test_equal_squares_change_little_and_scale_changes_nothing(name: str) -> None:
    weights, squares = _gaussian(8, 512), _squares(512)
    ones = np.ones(512, np.float32)
    plain = _error(name, get_form(name).pack(weights), weights, ones)
    packed = pack_matrix(name, weights, quantiser="weighted", input_squares=ones)
    assert _error(name, packed, weights, ones) <= plain * 1.001
    first, second = (
        pack_matrix(name, weights, quantiser="weighted", input_squares=squares * factor)
        for factor in (np.float32(1), np.float32(2**20))
    )
    assert np.array_equal(first, second)


@pytest.mark.parametrize("quantiser", ["imatrix", "weighted", "refit"])
def test_an_expert_that_saw_nothing_is_rounded_like_any_other(quantiser: str) -> None:
    if quantiser == "imatrix" and not ggml_library.is_installed():
        pytest.skip("llama-cpp-python brings libggml")
    name = "tq2_0" if quantiser == "refit" else "q4_k"
    weights = _gaussian(4, 512)
    packed = pack_matrix(name, weights, quantiser=quantiser, input_squares=np.zeros(512))
    nearest = _error(name, get_form(name).pack(weights), weights, np.ones(512, np.float32))
    assert _error(name, packed, weights, np.ones(512, np.float32)) <= nearest * 1.1


# ---------------------------------------------------------------------------- refits


def _plain(num_blocks: int) -> Grid:
    """d = 1 and one scale of 1 in every block."""
    ones = np.ones((num_blocks, 1), np.float32)
    return Grid(ones[:, 0], ones)


def _int8(values: object) -> CodeArray:
    return np.array(values, dtype=np.int8)


def test_refit_by_hand() -> None:
    weights = np.array([[1.0, 3.0]], np.float32)
    grid = refit_by_squares(weights, _plain(1), _int8([[1, 1]]), np.array([3.0, 1.0]))
    # squares plus the damping of 0.01 x 2
    assert grid.d[0] == pytest.approx((3.02 * 1 + 1.02 * 3) / (3.02 + 1.02), rel=1e-3)
    hessian = np.array([[2.0, 1.0], [1.0, 2.0]])
    grid = refit_by_hessian(weights, _plain(2), _int8([[1, 1]]), hessian)
    assert grid.d.tolist() == pytest.approx([1.0, 3.0], rel=1e-3)  # reproduces two weights
    grid = refit_by_hessian(weights, _plain(2), _int8([[1, 0]]), hessian)
    assert grid.d[0] == pytest.approx((2.02 * 1 + 1 * 3) / 2.02, rel=1e-3)  # 3 is made up for
    assert np.isfinite(grid.d).all()


def test_refit_of_scale_and_minimum_by_hand() -> None:
    # q = d (0, 1, 2, 3) - dmin: the line through four weights that lie on one
    weights = np.array([[-0.5, 0.25, 1.0, 1.75]], np.float32)
    one = np.ones((1, 1), np.float32)
    grid = Grid(one[0], one, one[0], one)
    for found in (
        refit_by_squares(weights, grid, _int8([[0, 1, 2, 3]]), np.array([1.0, 5.0, 2.0, 3.0])),
        refit_by_hessian(weights, grid, _int8([[0, 1, 2, 3]]), np.eye(4) + 0.5),
    ):
        assert found.dmin is not None
        assert (found.d[0], found.dmin[0]) == pytest.approx((0.75, 0.5), rel=1e-3)


def test_the_full_refit_is_the_least_squares_of_the_output() -> None:
    rng = np.random.default_rng(4)
    inputs = rng.standard_normal((700, 512)) @ rng.standard_normal((512, 512))
    weights = _gaussian(3, 512)
    codes = np.rint(weights).clip(-1, 1).astype(np.int8)
    hessian = inputs.T @ inputs
    scales = refit_by_hessian(weights, _plain(6), codes, hessian).d.reshape(3, 2)
    damping = np.sqrt(0.01 * np.diagonal(hessian).mean()) * np.eye(512)
    design = np.concatenate([inputs, damping])
    for row in range(3):
        columns = [design[:, at : at + 256] @ codes[row, at : at + 256] for at in (0, 256)]
        expected = np.linalg.lstsq(np.stack(columns, axis=1), design @ weights[row], rcond=None)[0]
        assert scales[row] == pytest.approx(expected, rel=1e-3)  # rounded to fp16


@pytest.mark.parametrize("name", BLOCK_FORMS)
@pytest.mark.parametrize("kind", ["normal", "constant", "sparse"])
def test_a_refit_never_adds_to_the_output_error(name: str, kind: str) -> None:
    rng = np.random.default_rng(8)
    weights = _gaussian(130, 512)  # more rows than are solved at a time
    if kind == "constant":
        weights[:] = rng.choice([-0.25, 0.5], (130, 1))  # scale and minimum say the same
    if kind == "sparse":
        weights *= rng.random(weights.shape) < 0.01
    hessian = _hessian(512)
    damped = hessian + 0.01 * np.diagonal(hessian).mean() * np.eye(512, dtype=np.float32)
    form = get_form(name)
    nearest = form.unpack(form.pack(weights), 512)
    packed = pack_matrix(name, weights, quantiser="refit", hessian=hessian)
    loss = output_loss(form.unpack(packed, 512) - weights, damped)
    assert loss <= output_loss(nearest - weights, damped) * 1.0001


# ---------------------------------------------------------------------------- the seam


def _hessian(width: int, seed: int = 5) -> FloatArray:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((2 * width, width)) @ rng.standard_normal((width, width))
    return (inputs.T @ inputs).astype(np.float32)


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("name", ["tq1_0", "q4_k", "bf16", "q4_k/q4_k/q6_k", "q3_k/q4_k/q5_k"])
def test_an_expert_is_three_matrices_each_with_its_own_moments(name: str, quantiser: str) -> None:
    if quantiser == "imatrix" and not ggml_library.is_installed():
        pytest.skip("llama-cpp-python brings libggml")
    forms = get_quantiser(quantiser).forms
    if forms is not None and "q4_k" in name:  # bf16 has nothing to choose
        pytest.skip(f"{quantiser} is for ternary forms")
    matrices = _gaussian(512, 256), _gaussian(512, 256, 1), _gaussian(256, 512, 2)
    hessians = _hessian(256), _hessian(512, 6)
    squares = [np.diagonal(hessian).copy() for hessian in hessians]
    record = pack_expert_with(
        name,
        *matrices,
        quantiser,
        input_squares=squares[0],
        inner_squares=squares[1],
        hessians=hessians,
    )
    if quantiser in ("nearest", "lloyd") or name == "bf16":
        assert np.array_equal(record, pack_expert(name, *matrices))
    found = unpack_expert(name, record, 256, 512)
    rows = zip(split_form(name), matrices, found, (0, 0, 1), strict=True)
    for part, matrix, unpacked, which in rows:
        packed = pack_matrix(
            part,
            matrix,
            quantiser=quantiser,
            input_squares=squares[which],
            hessian=hessians[which],
        )
        assert np.array_equal(unpacked, get_form(part).unpack(packed, matrix.shape[1]))


@pytest.mark.parametrize("quantiser", ["imatrix", "weighted", "refit", "gptq", "gptq_refit"])
def test_missing_moments_are_named(quantiser: str) -> None:
    with pytest.raises(InputError, match=f"'{quantiser}' needs the .*hessian.*calibrate"):
        pack_matrix("tq1_0", _gaussian(2, 256), quantiser=quantiser)
    assert len(pack_matrix("bf16", _gaussian(2, 256), quantiser=quantiser)) == 2  # nothing to do


def test_gptq_does_not_pass_for_itself_on_squares() -> None:
    with pytest.raises(InputError, match="'gptq' needs the hessian"):
        pack_matrix("q4_k", _gaussian(2, 256), quantiser="gptq", input_squares=_squares(256))


def test_refusals_name_what_is_wrong() -> None:
    weights = _gaussian(2, 256)
    with pytest.raises(InputError, match="'best' is unknown: use one of nearest, imatrix"):
        pack_matrix("q4_k", weights, quantiser="best")
    with pytest.raises(InputError, match="'absmean' packs tq1_0, .*, int2_b32, not q4_k"):
        pack_matrix("q4_k", weights, quantiser="absmean")
    with pytest.raises(InputError, match=r"squares .*\(255,\).*\(256,\)"):
        pack_matrix("q4_k", weights, quantiser="weighted", input_squares=_squares(255))
    damaged = _hessian(256)
    damaged[3, 4] = np.nan
    with pytest.raises(InputError, match="hessian .* NaN"):
        pack_matrix("q4_k", weights, quantiser="gptq", hessian=damaged)
    weights[1, 7] = np.inf
    for quantiser in ("weighted", "gptq", "refit"):
        with pytest.raises(FormError, match="tq1_0 cannot hold"):
            pack_matrix(
                "tq1_0",
                weights,
                quantiser=quantiser,
                input_squares=_squares(256),
                hessian=_hessian(256),
            )


def test_libggml_is_asked_with_whole_rows_and_finite_numbers() -> None:
    form = get_form("q4_k")
    with pytest.raises(FormError, match="blocks of 256 weights; a row of 300"):
        ggml_library.quantize_chunk(form, _gaussian(2, 300), None)
    with pytest.raises(FormError, match=r"q4_k: the importance of 256 columns has shape \(255,\)"):
        ggml_library.quantize_chunk(form, _gaussian(2, 256), _squares(255))
    with pytest.raises(FormError, match="a weight is NaN"):
        ggml_library.quantize_chunk(form, np.full((1, 256), np.nan, np.float32), None)


def test_without_libggml_imatrix_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    ggml_library._library.cache_clear()
    monkeypatch.setattr(ggml_library, "_path", lambda: None)
    assert not ggml_library.is_installed()
    with pytest.raises(MissingExtraError, match=r"edge-moe\[gguf\]"):
        pack_matrix("q4_k", _gaussian(2, 256), quantiser="imatrix", input_squares=_squares(256))
    squares = _squares(256)
    packed = pack_matrix("tq1_0", _gaussian(2, 256), quantiser="imatrix", input_squares=squares)
    assert packed.shape == (2, 54)


def test_every_block_form_says_what_gptq_needs_to_know() -> None:
    for name in BLOCK_FORMS:
        form = get_form(name)
        assert isinstance(form, BlockForm)
        grid, codes = form.fit(_gaussian(5, form.block_size))
        low, high = form.code_range
        assert codes.dtype == np.int8 and low <= codes.min() < codes.max() <= high
        assert grid.step().shape == (5, form.block_size // form.sub_block)
        assert np.array_equal(
            form.unpack(form.join(grid, codes), form.block_size), grid.values(codes)
        )
