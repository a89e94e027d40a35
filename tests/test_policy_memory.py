"""What orders of eviction take is in the bill, where experts page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinyCheckpoint

from edge_moe.checkpoint import Checkpoint
from edge_moe.runtime.allotment import eviction_terms, host_terms, open_store, record_sizes
from edge_moe.runtime.next_use import SoonestNextUse
from edge_moe.runtime.policies import DEFAULT_POLICY
from edge_moe.runtime.policy import LeastRecentlyUsed
from edge_moe.runtime.policy_memory import TERM_NAME, order_terms
from edge_moe.runtime.session import Session


def arrays(of: Any) -> Iterator[np.ndarray]:
    """Of an object of ours, and of those that it holds in lists."""
    for value in vars(of).values():
        if isinstance(value, np.ndarray):
            yield value
        elif isinstance(value, list):
            for each in value:
                yield from arrays(each) if hasattr(each, "__dict__") else ()


@pytest.mark.parametrize(("num_layers", "num_rows"), [(1, 4), (3, 16), (5, 40), (12, 128)])
def test_the_formula_is_what_the_arrays_take(num_layers: int, num_rows: int) -> None:
    policy = SoonestNextUse()
    for layer in range(num_layers):
        for row in range(num_rows):
            policy.admit((layer, row))
    policy.use_all(0, [0, 1])
    assert policy.victim(lambda _: True) is not None
    assert sum(each.nbytes for each in arrays(policy)) == SoonestNextUse.order_bytes(
        num_layers, num_rows
    )


def test_an_order_of_many_experts_takes_megabytes() -> None:
    assert SoonestNextUse.order_bytes(48, 128) == pytest.approx(48 * 4 * 128**2, rel=0.07)
    assert SoonestNextUse.order_bytes(60, 512) == pytest.approx(60 * 4 * 512**2, rel=0.02)
    assert not order_terms([128] * 48, policy=LeastRecentlyUsed)
    sizes = [[1] * 60 + [2] * 4] * 3
    [term] = eviction_terms(sizes)
    assert term.num_bytes == 2 * SoonestNextUse.order_bytes(3, 64), (
        "every record size has an order of its own"
    )
    assert [term.name for term in host_terms(sizes, "cuda", None, is_paging=True)] == [
        "staging",
        TERM_NAME,
    ]


def test_a_session_that_pages_is_billed_for_it(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("olmoe")
    sizes = record_sizes(open_store(Checkpoint(folder)))
    expected = SoonestNextUse.order_bytes(len(sizes), len(sizes[0]))
    with_budget = billed(folder, budget_bytes=10**10)  # measures the process, where nobody has yet
    whole = billed(folder)
    fixed = sum(size for name, size in whole.items() if name != "experts")
    assert TERM_NAME not in whole
    assert with_budget.keys() == whole.keys()
    paged = billed(folder, num_slots=sum(map(len, sizes)) - 1)
    assert (
        paged[TERM_NAME] == expected and fixed + expected == sum(paged.values()) - paged["experts"]
    )


def test_nothing_is_ordered_where_nothing_leaves(tiny_checkpoint: TinyCheckpoint) -> None:
    found = {}
    for num_slots in (None, 4):
        with Session.open(tiny_checkpoint("olmoe"), context_tokens=64, num_slots=num_slots) as one:
            found[num_slots] = {type(each) for each in one._residency.cache._policies.values()}
    assert found == {None: {LeastRecentlyUsed}, 4: {DEFAULT_POLICY}}


def billed(folder: Path, **limits: int) -> dict[str, int]:
    with Session.open(folder, context_tokens=64, **limits) as session:  # type: ignore[arg-type]
        return {term.name: term.num_bytes for term in session.memory()}
