"""Triton's kernels beside their torch references: on a CUDA device, or in Triton's interpreter."""

from __future__ import annotations

from itertools import cycle, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edge_moe.formats import get_form
from edge_moe.runtime.kernels import packed_reference, unpack
from edge_moe.runtime.products import Pairs

pytest.importorskip("triton", reason="the kernels need the extra `cuda`")

from edge_moe.runtime.kernels.triton_decode import decode  # noqa: E402
from edge_moe.runtime.kernels.triton_forms import TRITON_FORMS  # noqa: E402
from edge_moe.runtime.kernels.triton_prefill import prefill  # noqa: E402
from edge_moe.runtime.kernels.triton_sum import add_weighted  # noqa: E402
from edge_moe.runtime.triton_products import make_tiles  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMS = tuple(sorted(TRITON_FORMS))


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Alike but for the order of up to 768 products."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-4)


def packed_matrix(form: str, rows: int, width: int, seed: int = 0) -> Tensor:
    """uint8 [rows, row bytes], at an address that is even and no more."""
    weights = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    packed = torch.from_numpy(get_form(form).pack(weights))
    memory = torch.empty(packed.numel() + 2, dtype=torch.uint8, device=DEVICE)
    memory[2:] = packed.view(-1).to(DEVICE)
    return memory[2:].view(packed.shape)


def some_inputs(rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, width, generator=generator).to(DEVICE)


def decoded(
    inputs: Tensor, tokens: list[int], matrices: list[tuple[str, Tensor]], is_gated: bool
) -> Tensor:
    """`decode`, called with the arguments of its reference."""
    forms = tuple(sorted({form for form, _ in matrices}))
    numbers = [forms.index(form) for form, _ in matrices]
    addresses = [packed.data_ptr() for _, packed in matrices]
    table = torch.tensor([tokens, addresses, numbers], device=DEVICE)
    outputs = torch.empty(len(tokens), len(matrices[0][1]) // (1 + is_gated), device=DEVICE)
    decode(
        *(inputs, table, outputs),
        width=inputs.shape[1],
        forms=forms,
        is_gated=is_gated,
        tile_rows=16,
    )
    return outputs


def prefilled(
    inputs: Tensor,
    tokens: list[int],
    experts: list[tuple[str, Tensor]],
    lengths: list[int],
    is_gated: bool,
    tile_pairs: int = 16,
) -> Tensor:
    """`prefill` of experts with so many pairs each."""
    forms = tuple(sorted({form for form, _ in experts}))
    addresses = np.array([packed.data_ptr() for _, packed in experts])
    numbers = np.array([forms.index(form) for form, _ in experts])
    tiles = torch.from_numpy(make_tiles(lengths, addresses, numbers, tile_pairs)).to(DEVICE)
    outputs = torch.full((len(tokens), len(experts[0][1]) // (1 + is_gated)), 7.0, device=DEVICE)
    prefill(
        *(inputs, torch.tensor(tokens, device=DEVICE), tiles, outputs),
        width=inputs.shape[1],
        forms=forms,
        is_gated=is_gated,
        tile_pairs=tile_pairs,
        tile_rows=32,
    )
    return outputs


def a_width(form: str) -> int:
    """No multiple of what a kernel reads at once, as far as the form allows it."""
    return {1: 40, 32: 96, 64: 192, 256: 768}[get_form(form).block_size]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of random bytes
@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_that_unpack_finds(form: str) -> None:
    """Products with the rows of the identity matrix are the weights themselves."""
    width = a_width(form) if get_form(form).block_size < 256 else 256
    kind = get_form(form)
    random = np.random.default_rng(1).integers(0, 256, (13, kind.row_bytes(width)), np.uint8)
    for packed in (packed_matrix(form, 13, width), torch.from_numpy(random).to(DEVICE)):
        expected = unpack(form, packed, width)
        is_finite = expected.isfinite().all(dim=1)
        assert is_finite.any()
        places = list(range(width))
        one = [(form, packed)]
        found = prefilled(torch.eye(width, device=DEVICE), places, one, [width], False, 256).T
        # the interpreter knows no subnormal bf16; a GPU rounds scale * code - minimum once
        limits = (0.0, 1e-37) if DEVICE.type == "cpu" else (1e-5, 1e-5)
        torch.testing.assert_close(
            found[is_finite], expected[is_finite], rtol=limits[0], atol=limits[1]
        )


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_decodes(form: str, is_gated: bool) -> None:
    """One token, one expert; fewer rows than a tile, and one more than a tile."""
    inputs = some_inputs(1, a_width(form))
    for num_rows in (1, 17):
        packed = packed_matrix(form, num_rows * (1 + is_gated), a_width(form))
        one = [(form, packed)]
        expected = packed_reference.packed_products(
            inputs, torch.tensor([0]), one, is_gated=is_gated
        )
        assert_close(decoded(inputs, [0], one, is_gated), expected)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    forms=st.lists(st.sampled_from(FORMS), min_size=1, max_size=5),
    num_tokens=st.integers(1, 3),
    num_rows=st.integers(1, 19),
    is_gated=st.booleans(),
)
def test_pairs_of_all_forms_decode_in_one_launch(
    forms: list[str], num_tokens: int, num_rows: int, is_gated: bool
) -> None:
    inputs = some_inputs(num_tokens, 256)
    tokens = list(islice(cycle(range(num_tokens)), len(forms)))
    matrices = [
        (form, packed_matrix(form, num_rows * (1 + is_gated), 256, seed))
        for seed, form in enumerate(forms)
    ]
    expected = packed_reference.packed_products(
        inputs, torch.tensor(tokens), matrices, is_gated=is_gated
    )
    assert_close(decoded(inputs, tokens, matrices, is_gated), expected)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    experts=st.lists(
        st.tuples(st.sampled_from(FORMS), st.integers(0, 35)), min_size=1, max_size=4
    ).filter(lambda experts: any(length for _, length in experts)),
    num_rows=st.integers(1, 37),
    is_gated=st.booleans(),
)
def test_groups_of_any_size_and_form_are_prefilled_in_one_launch(
    experts: list[tuple[str, int]], num_rows: int, is_gated: bool
) -> None:
    """Also experts that nobody chose."""
    inputs = some_inputs(9, 256)
    lengths = [length for _, length in experts]
    tokens = list(islice(cycle([3, 0, 8, 5]), sum(lengths)))
    matrices = [
        (form, packed_matrix(form, num_rows * (1 + is_gated), 256, seed))
        for seed, (form, _) in enumerate(experts)
    ]
    of_pairs = [
        matrix for matrix, length in zip(matrices, lengths, strict=True) for _ in range(length)
    ]
    expected = packed_reference.packed_products(
        inputs, torch.tensor(tokens), of_pairs, is_gated=is_gated
    )
    found = prefilled(inputs, tokens, matrices, lengths, is_gated)
    assert_close(found, expected)


@pytest.mark.parametrize("form", FORMS)
def test_steps_that_end_within_a_row_are_prefilled(form: str) -> None:
    inputs = some_inputs(3, a_width(form))
    one = [(form, packed_matrix(form, 33, a_width(form)))]
    expected = packed_reference.packed_products(
        inputs, torch.arange(3), [*one, *one, *one], is_gated=False
    )
    found = prefilled(inputs, [0, 1, 2], one, [3], False)
    assert_close(found, expected)


def test_a_pair_does_not_depend_on_who_shares_its_tile() -> None:
    inputs = some_inputs(5, 256)
    one = [("q4_k", packed_matrix("q4_k", 24, 256))]
    together = prefilled(inputs, [0, 1, 2, 3, 4], one, [5], True)
    for token in range(5):
        assert torch.equal(prefilled(inputs, [token], one, [1], True)[0], together[token])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 70), max_size=9), st.sampled_from([1, 16, 32]))
def test_tiles_cover_every_pair_once_and_never_two_experts(
    lengths: list[int], tile_pairs: int
) -> None:
    numbers = np.arange(len(lengths))
    tiles = make_tiles(lengths, numbers * 1000, numbers, tile_pairs)
    owner = np.repeat(numbers, np.array(lengths, np.int64))
    covered: list[int] = []
    for first, stop, address, number in tiles.T.tolist():
        assert 0 < stop - first <= tile_pairs and address == 1000 * number
        assert (owner[first:stop] == number).all()
        covered.extend(range(first, stop))
    assert covered == list(range(sum(lengths)))


@pytest.mark.parametrize("width", [1, 300])
def test_weighted_sums_do_not_depend_on_how_many_results_come_at_once(width: int) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.tensor([[4, 1, 0], [-1, 2, 0], [-1, -1, -1], [3, 0, 4]])
    pairs = Pairs.of(rows, torch.rand(4, 3, generator=generator))
    assert pairs.places.tolist() == [[0, 3, 6], [-1, 1, 4], [-1, -1, -1], [2, 5, 7]]
    results = torch.randn(8, width, generator=generator)
    places, scales = pairs.places.to(DEVICE), pairs.weights.to(DEVICE)
    start = torch.randn(4, width, generator=generator)
    expected, at_once, in_parts = start.clone(), start.to(DEVICE), start.to(DEVICE, copy=True)
    packed_reference.add_weighted(expected, results, pairs.places, pairs.weights, 0)
    add_weighted(at_once, results.to(DEVICE), places, scales, 0)
    for first, stop in ((0, 1), (1, 4), (4, 8)):
        add_weighted(in_parts, results[first:stop].to(DEVICE).contiguous(), places, scales, first)
    torch.testing.assert_close(at_once.cpu(), expected)
    assert torch.equal(at_once, in_parts)
