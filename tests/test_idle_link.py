"""What the disk can read without keeping anybody waiting."""

from __future__ import annotations

import time

import pytest

from edge_moe.runtime.idle_link import IdleLink
from edge_moe.runtime.read_queue import Read


def _read(start_seconds: float, end_seconds: float) -> Read[None]:
    read: Read[None] = Read(None, True)
    read.start_seconds, read.end_seconds = start_seconds, end_seconds
    return read


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_nothing_is_known_at_first() -> None:
    link = IdleLink()
    link.end([_read(0, 1)], 100)
    assert link.spare_bytes(is_reading=True) == link.spare_bytes(is_reading=False) == 0


def test_guesses_get_the_time_between_the_last_read_and_the_next_choice(
    clock: list[float],
) -> None:
    link = IdleLink(decay=0.5)
    link.begin()
    clock[0] = 5.0
    link.end([_read(0, 2), _read(1, 3)], 300)  # 100 bytes a second, idle from 3 to 5
    assert link.spare_bytes(is_reading=True) == link.spare_bytes(is_reading=False) == 200
    link.begin()
    clock[0] = 8.0
    link.end([], 0)  # nothing was wanted for 3 seconds
    assert link.spare_bytes(is_reading=False) == 300
    assert link.spare_bytes(is_reading=True) == 200
    link.begin()
    clock[0] = 12.0
    link.end([_read(8, 12)], 800)  # 200 bytes a second, and no time left
    assert link.idle_seconds == 1.0 and link.bytes_per_second == 150
    link.begin()
    link.forget()
    clock[0] = 100.0
    link.end([], 0)
    assert link.layer_seconds == 3.0
