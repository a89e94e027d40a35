"""Ctrl-C at any line of paging leaves a session that goes on: nothing stays pinned or half read."""

from __future__ import annotations

import signal

import pytest
from conftest import TinyCheckpoint
from traced_lines import at_line

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
