"""What the disk can read without keeping anybody waiting."""

from __future__ import annotations

from pathlib import Path

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


def test_nothing_is_known_at_first() -> None:
    link = IdleLink()
    link.end([_read(0, 1, 100)], 0)
    assert link.spare_bytes(is_reading=True) == link.spare_bytes(is_reading=False) == 0


def test_guesses_get_the_time_between_the_last_read_and_the_next_choice() -> None:
    link = IdleLink(decay=0.5)
    link.begin(0)
    link.end([_read(0, 2, 100), _read(1, 3, 200)], 5)  # 100 bytes a second, idle from 3 to 5
    assert link.spare_bytes(is_reading=True) == link.spare_bytes(is_reading=False) == 200
    link.begin(5)
    link.end([], 8)  # nothing was wanted for 3 seconds
    assert link.spare_bytes(is_reading=False) == 300
    assert link.spare_bytes(is_reading=True) == 200
    link.begin(8)
    link.end([_read(8, 12, 800)], 12)  # 200 bytes a second, and no time left
    assert link.idle_seconds == 1.0 and link.bytes_per_second == 150
    link.begin(12)
    link.forget()
    link.end([], 100)
    assert link.layer_seconds == 3.0


def test_what_nobody_saw_end_ends_when_the_disk_can_have_read_it() -> None:
    link = IdleLink(decay=0)
    link.begin(0)
    link.end([_read(0, 4, 400)], 0)  # 100 bytes a second
    link.begin(0)
    link.end([_read(0, 5, 200, is_end_known=False)], 5)
    assert (link.bytes_per_second, link.idle_seconds) == (100, 3)
    link.begin(5)
    link.end([_read(6, 9, 500, is_end_known=False)], 9)
    assert (link.bytes_per_second, link.idle_seconds) == (100, 0)


def test_a_guess_that_came_true_tells_nothing_of_the_disk() -> None:
    link = IdleLink(decay=0)
    link.begin(2)
    link.end([_read(0, 3, 10**6), _read(2, 3, 50)], 4)
    assert (link.bytes_per_second, link.idle_seconds) == (50, 1)
    link.begin(4)
    link.end([_read(0, 3, 10**6)], 9)
    assert (link.layer_seconds, link.idle_seconds) == (5, 1)
