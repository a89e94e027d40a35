"""What the disk can read without keeping anybody waiting."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edge_moe.runtime.gguf_slices import Slice
from edge_moe.runtime.idle_link import IdleLink
from edge_moe.runtime.read_queue import Read


def _read(
    start_seconds: float, end_seconds: float, num_bytes: int, *, is_end_known: bool = True
) -> Read[Slice]:
    read = Read(Slice(Path(), 0, 0, num_bytes, num_bytes, 0), is_wanted=True)
    read.start_seconds, read.end_seconds = start_seconds, end_seconds
    read.is_end_known = is_end_known
    return read


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_nothing_is_known_at_first() -> None:
    link = IdleLink()
    link.end([_read(0, 1, 100)])
    assert link.spare_bytes(is_reading=True) == link.spare_bytes(is_reading=False) == 0


def test_guesses_get_the_time_between_the_last_read_and_the_next_choice(
    clock: list[float],
) -> None:
    link = IdleLink(decay=0.5)
    link.begin()
    clock[0] = 5.0
    link.end([_read(0, 2, 100), _read(1, 3, 200)])  # 100 bytes a second, idle from 3 to 5
    assert link.spare_bytes(is_reading=True) == link.spare_bytes(is_reading=False) == 200
    link.begin()
    clock[0] = 8.0
    link.end([])  # nothing was wanted for 3 seconds
    assert link.spare_bytes(is_reading=False) == 300
    assert link.spare_bytes(is_reading=True) == 200
    link.begin()
    clock[0] = 12.0
    link.end([_read(8, 12, 800)])  # 200 bytes a second, and no time left
    assert link.idle_seconds == 1.0 and link.bytes_per_second == 150
    link.begin()
    link.forget()
    clock[0] = 100.0
    link.end([])
    assert link.layer_seconds == 3.0


def test_what_nobody_saw_end_ends_when_the_disk_can_have_read_it(clock: list[float]) -> None:
    link = IdleLink(decay=0)
    link.begin()
    link.end([_read(0, 4, 400)])  # 100 bytes a second
    link.begin()
    clock[0] = 5.0
    link.end([_read(0, 5, 200, is_end_known=False)])
    assert (link.bytes_per_second, link.idle_seconds) == (100, 3)
    link.begin()
    clock[0] = 9.0
    link.end([_read(6, 9, 500, is_end_known=False)])
    assert (link.bytes_per_second, link.idle_seconds) == (100, 0)


def test_a_guess_that_came_true_tells_nothing_of_the_disk(clock: list[float]) -> None:
    link = IdleLink(decay=0)
    clock[0] = 2.0
    link.begin()
    clock[0] = 4.0
    link.end([_read(0, 3, 10**6), _read(2, 3, 50)])
    assert (link.bytes_per_second, link.idle_seconds) == (50, 1)
    link.begin()
    clock[0] = 9.0
    link.end([_read(0, 3, 10**6)])
    assert (link.layer_seconds, link.idle_seconds) == (5, 1)
