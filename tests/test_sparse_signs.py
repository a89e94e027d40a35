"""Packed signs, by hand and at random."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_moe.errors import FormError
from edge_moe.sparse_signs import (
    PackedSigns,
    entropy_bytes,
    most_bytes,
    pack_signs,
    unpack_signs,
)


def packed(values: list[int]) -> PackedSigns:
    vector = np.array(values)
    places = np.flatnonzero(vector)
    return pack_signs(places, vector[places] < 0, len(vector))


def unpacked(signs: PackedSigns, length: int) -> list[int]:
    vector = np.zeros(length, int)
    places, is_negative = unpack_signs(signs, length)
    vector[places] = np.where(is_negative, -1, 1)
    found: list[int] = vector.tolist()
    return found


def test_bits_by_hand() -> None:
    """Gaps 5, 0, 11: with b = 2 the low bits are 01, 00, 11, the unary parts 01, 1, 001."""
    values = [0] * 5 + [1, -1] + [0] * 11 + [1] + [0] * 3
    found = packed(values)
    assert (found.num_kept, found.rice_bits, found.lists_zeros) == (3, 2, False)
    low = 0b11_00_01  # first place lowest
    unary = 0b1_00_1_10  # read from the lowest bit: 01, 1, 001
    assert found.data == bytes([low, unary, 0b010])
    assert unpacked(found, len(values)) == values


def test_dense_vectors_list_their_zeros_and_whole_ones_only_signs() -> None:
    values = [1, -1, 1, 1, 0, 1, -1, 1]
    found = packed(values)
    assert found.lists_zeros and found.num_kept == 7
    assert unpacked(found, 8) == values
    assert packed([-1] * 8).data == b"\xff"
    assert packed([0] * 8).data == b""


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 3000),
    st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
)
def test_round_trip(seed: int, length: int, density: float) -> None:
    generator = np.random.default_rng(seed)
    values = np.where(generator.random(length) < density, generator.choice([-1, 1], length), 0)
    found = packed(values.tolist())
    assert unpacked(found, length) == values.tolist()
    assert len(found.data) <= most_bytes(found.num_kept, length)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.5, 0.9])
def test_near_the_entropy(density: float) -> None:
    """Within 4 %: Rice codes come that near to geometric gaps, a bitmap to halves."""
    generator, length = np.random.default_rng(0), 2**18
    is_kept = generator.random(length) < density
    places = np.flatnonzero(is_kept)
    found = pack_signs(places, generator.random(len(places)) < 0.5, length)
    bound = entropy_bytes(found.num_kept, length)
    assert bound <= len(found.data) * 1.002
    assert len(found.data) < 1.04 * bound


@given(st.binary(max_size=64), st.integers(0, 200), st.integers(0, 30), st.booleans())
def test_any_bytes_are_a_vector_or_refused(
    data: bytes, num_kept: int, rice_bits: int, lists_zeros: bool
) -> None:
    try:
        places, is_negative = unpack_signs(PackedSigns(num_kept, rice_bits, lists_zeros, data), 128)
    except FormError:
        return
    assert len(places) == len(is_negative) == num_kept
    assert (np.diff(places) > 0).all() and (places >= 0).all() and (places < 128).all()


def test_truncated_bytes_are_refused() -> None:
    found = packed([1, 0, 0, -1, 0, 0, 0, 0, 1] * 20)
    short = dataclasses.replace(found, data=found.data[:-9])
    with pytest.raises(FormError):
        unpack_signs(short, 180)
