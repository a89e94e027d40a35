"""Sizes and lengths as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_moe.errors import InputError
from edge_moe.units import format_bytes, parse_bytes, parse_tokens, round_up_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("12GB", 12_000_000_000),
        ("12 gb", 12_000_000_000),
        ("1.5GiB", 1_610_612_736),
        ("8GiB", 8_589_934_592),
        (".5MB", 500_000),
        ("500 MiB", 524_288_000),
        ("4096B", 4096),
        ("2TB", 2_000_000_000_000),
        (" 3 kB ", 3000),
    ],
)
def test_parse_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["12 parsecs", "12", "", "GB", "-1GB", "1e9B", "1,5GB", "0GB"])
def test_parse_bytes_refuses_with_the_value_and_a_remedy(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value) and "12GB" in str(caught.value)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_345_678, "12.3 MB"),
        (999_499_999, "999 MB"),
        (999_500_000, "1.00 GB"),
        (9_994_999, "9.99 MB"),
        (9_995_000, "10.0 MB"),
        (61_064_245_248, "61.1 GB"),
        (5_000_000_000_000_000, "5000 TB"),
        (-1_500_000, "-1.50 MB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(min_value=1, max_value=10**15))
def test_what_is_printed_is_within_half_a_percent(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.0051)


@pytest.mark.parametrize(("text", "tokens"), [("8k", 8192), ("512", 512), ("1M", 2**20)])
def test_parse_tokens(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["0", "-5", "8 kilo", "1.5k", ""])
def test_parse_tokens_refuses(text: str) -> None:
    with pytest.raises(InputError, match="context length"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(443_435_538, "443.5MB"), (999_950_001, "1000MB"), (12_000_000_000, "12GB"), (7, "7B")],
)
def test_round_up_bytes(count: int, text: str) -> None:
    assert round_up_bytes(count) == text


@given(st.integers(min_value=1, max_value=10**15))
def test_a_size_that_was_rounded_up_is_enough_and_hardly_more(count: int) -> None:
    assert count <= parse_bytes(round_up_bytes(count)) <= count * 1.0011
