"""QMoE's integer forms: codes by hand, properties, and what onnxruntime dequantises them to."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_moe.errors import FormError
from edge_moe.formats import get_form
from edge_moe.formats.base import FloatArray
from edge_moe.formats.integers import IntegerForm, pack_codes, unpack_codes
from edge_moe.formats.quantise import pack_matrix

NAMES = ("int2_b64", "int2_b32", "int4_b64", "int4_b32", "int8_row")
BLOCKS = NAMES[:-1]


def form_of(name: str) -> IntegerForm:
    return cast(IntegerForm, get_form(name))


def gaussian(rows: int, width: int, seed: int = 0) -> FloatArray:
    weights: FloatArray = np.random.default_rng(seed).standard_normal((rows, width), np.float32)
    return weights


def test_codes_lie_lowest_bits_first() -> None:
    two = np.array([[0, 1, 2, 3, 3, 0, 0, 0]], np.uint8)
    assert pack_codes(two, 2).tolist() == [[0b11_10_01_00, 0b11]]
    assert pack_codes(np.array([[1, 15]], np.uint8), 4).tolist() == [[0xF1]]


@given(st.sampled_from([2, 4, 8]), st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 9))
def test_codes_survive_packing(bits: int, seed: int, rows: int, count: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, 4 * count), np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, 4 * count * bits // 8)
    assert np.array_equal(unpack_codes(packed, bits), codes)


@given(
    st.sampled_from(NAMES),
    st.integers(0, 2**32 - 1),
    st.floats(-4, 4),
    st.sampled_from([64, 128, 192]),
)
def test_packing_what_was_unpacked_hardly_changes_a_weight(
    name: str, seed: int, exponent: float, width: int
) -> None:
    """And the weights are (code - half) * scale, as `split` gives them to QMoE."""
    form = form_of(name)
    weights = gaussian(3, width, seed) * np.float32(10**exponent)
    packed = form.pack(weights)
    assert packed.shape == (3, form.row_bytes(width))
    found = form.unpack(packed, width)
    codes, scales = form.split(packed, width)
    signed = unpack_codes(codes, form.bits).astype(np.float32) - 2 ** (form.bits - 1)
    blocks = signed.reshape(3, scales.shape[1], -1) * scales[..., None]
    assert np.array_equal(blocks.reshape(3, width), found)
    step = np.abs(scales).repeat(width // scales.shape[1], axis=1)
    assert (np.abs(found) <= step * 2 ** (form.bits - 1)).all()
    again = form.unpack(form.pack(found), width)
    if form.bits == 4:  # a block whose largest code is 5 has its scale outside of what is tried
        assert (np.abs(again - found) <= step).all()
    else:
        assert np.allclose(again, found, rtol=2e-3 if form.bits < 8 else 1e-6, atol=0)


@pytest.mark.parametrize("name", ["int2_b64", "int2_b32"])
@pytest.mark.parametrize("quantiser", ["nearest", "lloyd", "absmean", "gptq", "gptq_refit"])
def test_ternary_weights_pass_through(name: str, quantiser: str) -> None:
    rng = np.random.default_rng(2)
    block = get_form(name).block_size
    scale = rng.uniform(0.01, 0.2, (8, 4, 1)).astype(np.float16).astype(np.float32)
    trits = rng.integers(-1, 2, (8, 4, block))
    weights = (trits * scale).reshape(8, -1).astype(np.float32)
    if quantiser == "absmean":  # d is the mean of |w|: only a block without zeros keeps its d
        weights = (np.where(trits == 0, 1, trits) * scale).reshape(8, -1).astype(np.float32)
    inputs = rng.standard_normal((2048, weights.shape[1]))
    packed = pack_matrix(name, weights, quantiser=quantiser, hessian=inputs.T @ inputs)
    assert np.allclose(get_form(name).unpack(packed, weights.shape[1]), weights, rtol=1e-3)
    if quantiser in ("nearest", "lloyd"):
        assert np.array_equal(get_form(name).unpack(packed, weights.shape[1]), weights)


@pytest.mark.parametrize(
    ("name", "limit"),
    [("int2_b64", 0.353), ("int2_b32", 0.333), ("int4_b64", 0.090), ("int4_b32", 0.082),
     ("int8_row", 0.010)],
)  # fmt: skip
def test_errors_on_gaussian_weights(name: str, limit: float) -> None:
    weights, form = gaussian(64, 1024), get_form(name)
    difference = form.unpack(form.pack(weights), 1024) - weights
    assert np.linalg.norm(difference) / np.linalg.norm(weights) < limit


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_no_scale_reaches_are_refused(name: str) -> None:
    for bad in (np.nan, np.inf, 1e9):
        with pytest.raises(FormError, match=name):
            get_form(name).pack(np.full((1, 64), bad, np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name: str) -> None:
    form = get_form(name)
    assert not form.unpack(form.pack(np.zeros((2, 64), np.float32)), 64).any()


@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_dequantises_to_the_same_weights(name: str) -> None:
    """One expert in a QMoE node of its own, against float64.

    Only int2_b64 meets a kernel that rounds activations to 8 bits: its rows always come in
    multiples of 128.
    """
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    form, width = form_of(name), 96 if name.endswith("32") else 192
    up = gaussian(2 * width, width, 1) * np.float32(0.05)
    down = gaussian(width, width, 2) * np.float32(0.05)
    stored: list[Any] = []
    values: dict[str, Any] = {}
    for label, matrix in (("1", up), ("2", down)):
        codes, scales = form.split(form.pack(matrix), width)
        values[f"q{label}"] = codes[None]
        values[f"s{label}"] = scales[None] if not form.row_blocks else scales[None, :, 0]
        stored.append(form.unpack(form.pack(matrix), width).astype(np.float64))
    blocks = {} if form.row_blocks else {"block_size": form.block_size}
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node(
        "QMoE", ["x", "r", "q1", "s1", "", "q2", "s2"], ["y"], domain="com.microsoft", k=1,
        expert_weight_bits=form.bits, weights_prepacked=0, normalize_routing_weights=1,
        activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
        **blocks,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(n, kind, [None, w]) for n, w in (("x", width), ("r", 1))],
        [helper.make_tensor_value_info("y", kind, [None, width])],
        [onnx.numpy_helper.from_array(array, n) for n, array in values.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = gaussian(5, width, 3)
    (found,) = session.run(None, {"x": x, "r": np.zeros((5, 1), np.float32)})
    gate, upper = (x @ stored[0][half::2].T for half in (0, 1))
    expected = (gate / (1 + np.exp(-gate)) * upper) @ stored[1].T
    limit = 3e-2 if name == "int2_b64" else 2e-6
    assert np.abs(found - expected).max() < limit * np.abs(expected).max()
