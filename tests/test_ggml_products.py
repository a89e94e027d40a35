"""Products with packed matrices by libggml, beside the same matrices unpacked."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_moe.formats import ggml_library
from edge_moe.formats.dequantise import dequantise
from edge_moe.formats.ggml_types import GGML_TYPES_BY_NAME
from edge_moe.runtime.kernels.ggml_products import Backend, MatrixStack, Product, ggml_cpu

pytest.importorskip("llama_cpp")

TOLERANCES = {"F32": 1e-5, "F16": 1e-3, "BF16": 4e-3}
"""Relative error that rounding inputs to the weights' type makes; the others round to 8 bits."""
EIGHT_BITS = 0.02
TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K"),
    *("Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "Q2_0", "IQ4_NL", "IQ4_XS", "MXFP4"),
)


def stack_of(
    name: str, count: int, rows: int, width: int, offset_bytes: int = 0, tail_bytes: int = 0
) -> tuple[MatrixStack, npt.NDArray[np.float32]]:
    """Random matrices [count, rows, width], packed, with other bytes around each, and unpacked."""
    kind = GGML_TYPES_BY_NAME[name]
    weights = np.random.default_rng(0).standard_normal((count * rows, width), np.float32)
    packed = ggml_library.quantize_chunk(kind, weights, None)
    unpacked = dequantise(name, packed.tobytes(), weights.size).reshape(count, rows, width)
    slots = np.full((count, offset_bytes + packed.nbytes // count + tail_bytes), 255, np.uint8)
    end = offset_bytes + packed.nbytes // count
    slots[:, offset_bytes:end] = packed.reshape(count, -1)
    return MatrixStack(torch.from_numpy(slots), kind, rows, width, offset_bytes), unpacked


def multiply(
    stack: MatrixStack, inputs: torch.Tensor, chosen: list[int], num_threads: int = 2
) -> npt.NDArray[np.float32]:
    backend = Backend(num_threads)
    is_shared = len(inputs) < len(chosen)
    product = Product(backend, stack, len(chosen), is_shared=is_shared)
    try:
        return product(inputs, np.array(chosen)).numpy().copy()
    finally:
        product.close()
        backend.close()


def relative(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_a_product_worked_out_by_hand() -> None:
    # Two matrices [1, 32] in q8_0, scale 1 each: all 2, all -3; one byte lies before each.
    block = np.concatenate([np.array([1.0], np.float16).view(np.uint8), np.full(32, 2, np.uint8)])
    other = np.concatenate([block[:2], np.full(32, -3, np.int8).view(np.uint8)])
    slots = torch.from_numpy(np.stack([np.r_[np.uint8(7), block], np.r_[np.uint8(7), other]]))
    stack = MatrixStack(slots, GGML_TYPES_BY_NAME["Q8_0"], rows=1, width=32, offset_bytes=1)
    inputs = torch.ones(3, 32)
    inputs[1] = 127.0  # a scale of 1 in eight bits
    np.testing.assert_allclose(
        multiply(stack, inputs, [0, 1, 1]), [[64.0], [-96 * 127.0], [-96.0]], rtol=1e-3
    )


@pytest.mark.parametrize("name", TYPES)
def test_every_type_multiplies_as_its_floats_do(name: str) -> None:
    stack, unpacked = stack_of(name, count=5, rows=24, width=256, offset_bytes=34, tail_bytes=2)
    inputs = torch.from_numpy(np.random.default_rng(1).standard_normal((7, 256), np.float32))
    chosen = [4, 0, 0, 2, 4, 1, 4]
    expected = np.einsum("rw,row->ro", inputs.numpy(), unpacked[chosen])
    found = multiply(stack, inputs, chosen)
    assert relative(found, expected) < TOLERANCES.get(name, EIGHT_BITS)
    shared = multiply(stack, inputs[:1], chosen)
    assert relative(shared, unpacked[chosen] @ inputs[0].numpy()) < TOLERANCES.get(name, EIGHT_BITS)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["Q8_0", "Q4_0", "Q4_K", "TQ2_0", "BF16"]),
    count=st.integers(1, 6),
    rows=st.integers(1, 40),
    blocks=st.integers(1, 3),
    offset_bytes=st.integers(0, 70),
    num_rows=st.integers(1, 50),
    num_threads=st.integers(1, 3),
)
def test_shapes_offsets_and_threads(
    name: str,
    count: int,
    rows: int,
    blocks: int,
    offset_bytes: int,
    num_rows: int,
    num_threads: int,
) -> None:
    stack, unpacked = stack_of(name, count, rows, 256 * blocks, offset_bytes)
    generator = np.random.default_rng(num_rows)
    inputs = torch.from_numpy(generator.standard_normal((num_rows, 256 * blocks), np.float32))
    chosen = generator.integers(0, count, num_rows).tolist()
    expected = np.einsum("rw,row->ro", inputs.numpy(), unpacked[chosen])
    found = multiply(stack, inputs, chosen, num_threads)
    assert found.shape == expected.shape
    # of one product alone the rounding may be large; over the norm of the factors it is not
    scale = np.linalg.norm(unpacked) / np.sqrt(count) * np.linalg.norm(inputs)
    assert np.linalg.norm(found - expected) < EIGHT_BITS * scale


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "TQ2_0"])
def test_threads_and_company_do_not_change_a_result(name: str) -> None:
    stack, _ = stack_of(name, count=4, rows=64, width=256)
    inputs = torch.from_numpy(np.random.default_rng(2).standard_normal((40, 256), np.float32))
    chosen = [0] * 12 + [1] * 3 + [3] * 25
    whole = multiply(stack, inputs, chosen)
    np.testing.assert_array_equal(multiply(stack, inputs, chosen, num_threads=1), whole)
    parts = [multiply(stack, inputs[:15], chosen[:15]), multiply(stack, inputs[15:], chosen[15:])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_what_does_not_fit_is_refused_before_c_sees_it() -> None:
    kind, slots = GGML_TYPES_BY_NAME["Q8_0"], torch.zeros(2, 70, dtype=torch.uint8)
    with pytest.raises(ValueError, match="2 rows end at byte 71 of 70"):
        MatrixStack(slots, kind, rows=2, width=32, offset_bytes=3)
    with pytest.raises(ValueError, match="contiguous"):
        MatrixStack(slots[:, :68], kind, rows=2, width=32, offset_bytes=0)
    with pytest.raises(ValueError, match="rows end"):
        MatrixStack(slots[:0], kind, rows=2, width=32, offset_bytes=0)


def test_the_library_says_what_it_multiplies() -> None:
    assert all(ggml_cpu().can_multiply(GGML_TYPES_BY_NAME[name]) for name in TYPES)
    assert not ggml_cpu().can_multiply(GGML_TYPES_BY_NAME["I32"])
