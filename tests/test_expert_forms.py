"""Forms that name the types of gate, up and down apart, and types that are only kept as stored."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_moe.errors import FormError
from edge_moe.formats import (
    DROP,
    FORM_NAMES,
    STORED_NAMES,
    expert_bytes,
    expert_packed_bytes,
    form_bits,
    form_fits,
    form_label,
    get_form,
    in_order,
    is_form,
    join_form,
    pack_expert,
    split_form,
    unpack_expert,
)

STORED_PARTS = st.tuples(*[st.sampled_from(STORED_NAMES)] * 3)
PACKED_PARTS = st.tuples(*[st.sampled_from(FORM_NAMES[1:])] * 3)


@given(parts=STORED_PARTS)
def test_a_form_of_three_types_is_split_and_joined(parts: tuple[str, str, str]) -> None:
    name = join_form(*parts)
    assert split_form(name) == parts and is_form(name)
    assert ("/" in name) == (len(set(parts)) > 1)
    sizes = expert_packed_bytes(name, 512, 256)
    alone = [expert_packed_bytes(part, 512, 256)[i] for i, part in enumerate(parts)]
    assert list(sizes) == alone and expert_bytes(name, 512, 256) == sum(alone)
    assert form_bits(name) == pytest.approx(8 * sum(sizes) / (3 * 512 * 256))
    assert form_label(name)


@given(name=st.text("qk_0468/bft ", max_size=20))
def test_other_names_are_refused(name: str) -> None:
    try:
        parts = split_form(name)
    except FormError:
        assert name == DROP or not is_form(name)
        return
    assert join_form(*parts) == name


@pytest.mark.parametrize(
    "name", ["q4_k/q4_k", "q4_k/q4_k/q4_k", "q4_k/q4_k/drop", "Q4_K", "i8", "f64", "q8_k", "", "/"]
)
def test_names_that_are_no_form(name: str) -> None:
    assert not is_form(name)


@given(parts=PACKED_PARTS, seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_an_expert_in_three_types_is_packed_as_each_alone(
    parts: tuple[str, str, str], seed: int
) -> None:
    random = np.random.default_rng(seed)
    gate, up = random.normal(size=(2, 256, 512)).astype(np.float32)
    down = random.normal(size=(512, 256)).astype(np.float32)
    name = join_form(*parts)
    record = pack_expert(name, gate, up, down)
    assert record.size == expert_bytes(name, 512, 256)
    for matrix, part, found in zip(
        (gate, up, down), parts, unpack_expert(name, record, 512, 256), strict=True
    ):
        form = get_form(part)
        np.testing.assert_array_equal(found, form.unpack(form.pack(matrix), matrix.shape[1]))


def test_stored_types_are_read_but_not_packed() -> None:
    zeros = np.zeros((32, 32), np.float32)
    with pytest.raises(FormError, match="form 'q5_1' is unknown"):
        pack_expert("q5_1", zeros, zeros, zeros)
    record = np.zeros(expert_bytes("q5_1", 32, 32), np.uint8)
    for matrix in unpack_expert("q5_1", record, 32, 32):
        np.testing.assert_array_equal(matrix, zeros)


@given(forms=st.lists(st.sampled_from([DROP, *STORED_NAMES, "q4_k/q4_k/q6_k"])))
def test_forms_stand_in_order_of_bits(forms: list[str]) -> None:
    found = in_order(forms)
    assert set(found) == set(forms) and len(found) == len(set(forms))
    bits = [form_bits(form) for form in found]
    assert bits == sorted(bits)
    assert in_order(FORM_NAMES[::-1]) == list(FORM_NAMES)


def test_only_the_rows_of_each_matrix_have_to_fit() -> None:
    assert form_fits("q4_k/q4_k/q5_0", 256, 96)
    assert not form_fits("q4_k/q4_k/q6_k", 256, 96)
    assert not form_fits("q4_0/q4_k/q4_0", 96, 256)
