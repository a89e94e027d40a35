"""Ctrl-C at any line of paging leaves a session that goes on: nothing stays pinned or half read."""

from __future__ import annotations

import signal
from collections.abc import Generator
from typing import cast

import pytest
from conftest import TinyCheckpoint
from traced_lines import at_line

from edge_moe.runtime import memory
from edge_moe.runtime.generate import Sampling
from edge_moe.runtime.held_interrupts import HeldInterrupts
from edge_moe.runtime.session import Session

PROMPT = list(range(5, 25))
PAGING = ("expert_cache.py", "held_experts.py", "next_use.py", "paged_experts.py")
EVERY_SO_MANY_LINES = 29


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_token_leaves_the_session_as_it_was(
    tiny_checkpoint: TinyCheckpoint,
) -> None:
    with Session.open(tiny_checkpoint("olmoe"), num_slots=3, prefetch=False) as session:
        wanted = session.generate_ids(PROMPT, 2, stop_at_eos=False)
        entries = session._residency.cache._entries
        line, is_over = 1, False
        while not is_over:
            try:
                with at_line(line, PAGING, press_ctrl_c):
                    session.generate_ids(PROMPT, 2, stop_at_eos=False)
                is_over = True
            except KeyboardInterrupt:
                line += EVERY_SO_MANY_LINES
            assert {key: entry.pins for key, entry in entries.items() if entry.pins} == {}
            session.check_integrity()
        assert line > 20 * EVERY_SO_MANY_LINES
        assert session.generate_ids(PROMPT, 2, stop_at_eos=False) == wanted


@pytest.mark.usefixtures("ctrl_c")
def test_interrupts_are_raised_when_the_outermost_block_ends() -> None:
    interrupts, seen = HeldInterrupts(), []
    with pytest.raises(KeyboardInterrupt), interrupts.hold():
        with interrupts.hold():
            signal.raise_signal(signal.SIGINT)
            seen.append(interrupts.has_come)
        seen.append(interrupts.has_come)
    assert seen == [True, True] and not interrupts.has_come
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("ctrl_c")
def test_somebody_elses_handler_is_left_alone() -> None:
    calls = []
    signal.signal(signal.SIGINT, lambda *_: calls.append(1))
    with HeldInterrupts().hold():
        signal.raise_signal(signal.SIGINT)
        assert calls == [1]


@pytest.mark.parametrize("is_closed_early", [True, False])
def test_freed_memory_goes_back_after_every_answer(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, is_closed_early: bool
) -> None:
    """The allocator kept 15 MB after a thousand answers, beyond the budget."""
    calls: list[int] = []
    with Session.open(tiny_checkpoint("olmoe"), context_tokens=64) as session:
        monkeypatch.setattr(memory, "trim", lambda: calls.append(1))
        answer = session.new_loop().tokens(PROMPT, 8, Sampling(), set())
        next(answer)
        assert not calls
        if is_closed_early:
            cast("Generator[int]", answer).close()
        assert len(list(answer)) == (0 if is_closed_early else 7)
        assert len(calls) == 1
